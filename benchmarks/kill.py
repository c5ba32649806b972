"""Training killed with SIGKILL and resumed, again and again: the same adapter, to the last byte, or what differs.

    python -m benchmarks.kill [-n 30] [CASE…]      a CASE is a name in `kill_cases`; default: lora

Every trial trains a small base with `edgetune train`, in a process of its own that is killed at a random moment; every
second trial before a random change of a file (of the run, or of the cache of tokens) instead, so that the short moments
of writing are met. The run that goes on is killed again, and then resumed until it is done. `--at MOMENT` kills at a
named moment instead, one run at all that are named, one after the other. Where a case has several processes, one of
them is killed, and the others are ended as torchrun ends them. Exits with 1 where what is left (weights, moments,
random states, log, record, files) is not what a run left alone leaves, or where somebody was shown a traceback.

Processes are forked from one that has imported everything and computed nothing. The power is not cut: what the disk has
not written by then is not tried.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from socket import socket
from typing import Any

from benchmarks.kill_cases import CASES, make_case

STEPS = 8
PATIENCE = 20.0
"""Seconds that processes have to end when one of them was killed; then they are asked to, then made to."""

MOMENTS = {
    "start": r"os\.rename .*/run/edgetune\.json$",
    "cache": r"os\.rename .*/cache/tokens/\w+$",
    "step": "step 4",
    "checkpoint": rf"os\.rename .*/checkpoint-{STEPS // 2}$",
    "export": r"os\.rename .*/run/(adapter_)?model\.safetensors$",
    "report": r"open .*/run/\.report\.html\..*",
}
"""What the process was about to do: a change of a file, or the gradients of a step."""

Watch = Callable[[str], None]
"""Called with every change of a file before it is made, e.g. "os.rename /runs/a/checkpoint-4"."""


@dataclass(frozen=True)
class Trial:
    """One run in a directory of its own."""

    words: Sequence[str]
    """Of the command line, without where the run goes."""
    directory: Path
    processes: int = 1

    @property
    def run_dir(self) -> Path:
        """The run."""
        return self.directory / "run"

    def start(self, watch: Watch | None = None) -> list[int]:
        """Begin, or go on; the ids of the processes that do. `watch` is told what the first one does."""
        words = ["train", "--resume", str(self.run_dir)]
        if not (self.run_dir / "edgetune.json").is_file():
            words = [*self.words, "--steps", str(STEPS), "--save-every", "2", "-o", str(self.run_dir)]
        self.directory.mkdir(parents=True, exist_ok=True)
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        return [self._fork(words, rank, port, watch if rank == 0 else None) for rank in range(self.processes)]

    def _fork(self, words: Sequence[str], rank: int, port: int, watch: Watch | None) -> int:
        if pid := os.fork():
            return pid
        code = 99
        try:
            os.environ["EDGETUNE_HOME"] = str(self.directory / "home")
            if self.processes > 1:
                at = {"RANK": rank, "WORLD_SIZE": self.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.processes}
                os.environ.update({name: str(value) for name, value in {**at, **local}.items()})
            log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if watch is not None:
                _watch(str(self.directory), watch)
            from edgetune.cli.main import run

            code = int(run(words))
        finally:
            # Never back into the trials of the process it was forked from.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def is_finished(self) -> bool:
        """Whether the record says so."""
        record = self.run_dir / "edgetune.json"
        return record.is_file() and bool(json.loads(record.read_text(encoding="utf-8"))["finished"])

    @property
    def log(self) -> str:
        """What all its processes told, so far."""
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def finish(self) -> str:
        """Go on until it is done; what went wrong, if anything."""
        if not self.is_finished and any(codes := _wait(self.start())):
            return f"exit codes {codes}: {' '.join(self.log.strip().splitlines()[-3:])}"
        if "Traceback" in self.log:
            return f"a traceback:\n{self.log}"
        return "" if self.is_finished else "not finished"

    def left(self) -> dict[str, Any]:
        """What must not depend on kills."""
        found = sorted(path for path in self.run_dir.rglob("*") if path.is_file())
        exact = [path for path in found if path.suffix in (".safetensors", ".gguf") or path.name in _EXACT]
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        record = json.loads((self.run_dir / "edgetune.json").read_text(encoding="utf-8"))
        return {
            "bytes": {str(path.relative_to(self.run_dir)): sha256(path.read_bytes()).hexdigest() for path in exact},
            "log": [_timeless(line) for line in lines],
            "record": _timeless(record["metrics"]),
            "files": [str(path.relative_to(self.run_dir)) for path in found],
        }


_EXACT = ("adapter_config.json", "predictions.jsonl", "samples.json")


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without what depends on the machine's day."""
    return {k: v for k, v in values.items() if k not in ("seconds", "tokens_per_second", "memory_bytes")}


def _wait(pids: Sequence[int]) -> list[int]:
    """The processes' exit codes."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _end_others(pids: Sequence[int]) -> None:
    """Wait until they end by themselves; as a launcher does, ask them to where they do not, and then make them."""
    left = list(pids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + PATIENCE
        while left and time.monotonic() < until:
            left = [pid for pid in left if os.waitpid(pid, os.WNOHANG)[0] == 0]
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, number)
    _wait(left)


def _watch(directory: str, watch: Watch) -> None:
    """Call `watch` before every change of a file under `directory`, and before the gradients of every step."""

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            path = args[0] if changes else None
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            path = args[1] if event == "os.rename" else args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(directory):
            watch(f"{event} {os.fspath(path)}")

    sys.addaudithook(heard)
    from edgetune.training.loop import Loop

    forward, steps = Loop._backward, [0]

    def backward(*args: Any) -> float:
        steps[0] += 1
        watch(f"step {steps[0]}")
        return forward(*args)

    Loop._backward = backward  # type: ignore[method-assign, assignment]


def _kill_here() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_named(pattern: str) -> Watch:
    """Kills before what `pattern` matches."""
    return lambda change: _kill_here() if re.fullmatch(pattern, change) else None


def at_change(number: int) -> Watch:
    """Kills before the `number`-th change."""
    seen = [0]

    def watch(change: str) -> None:
        seen[0] += 1
        if seen[0] == number:
            _kill_here()

    return watch


def kill_randomly(trial: Trial, draw: random.Random, *, seconds: float, changes: int, by_change: bool) -> str:
    """Begin or go on, and kill; says at what moment."""
    victim = 0
    if by_change:
        pids = trial.start(at_change(number := draw.randint(1, changes)))
        what = f"change {number}"
    else:
        pids, moment, victim = trial.start(), draw.uniform(0, seconds), draw.randrange(trial.processes)
        time.sleep(moment)
        os.kill(pids[victim], signal.SIGKILL)
        what = f"{moment:.2f} s" + (f", process {victim}" if trial.processes > 1 else "")
    (code,) = _wait([pids[victim]])
    _end_others([pid for pid in pids if pid != pids[victim]])
    return f"{what}, {_place(trial)}" if code == -signal.SIGKILL else "after its end"


def _place(trial: Trial) -> str:
    """How far the run had come, by what is on the disk."""
    if not (trial.run_dir / "edgetune.json").is_file():
        return "before the run"
    if trial.is_finished:
        return "finished"
    checkpoints = sorted(int(path.name[11:]) for path in trial.run_dir.glob("checkpoint-*"))
    return f"checkpoint {checkpoints[-1] if checkpoints else 'none'}"


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(name for name in wanted if found[name] != wanted[name])


def measure(alone: Trial) -> tuple[dict[str, Any], float, int]:
    """A run left alone: what it leaves, its seconds, and how many changes its first process makes."""
    alone.directory.mkdir(parents=True)
    counts = alone.directory / "changes"
    with counts.open("w", buffering=1) as lines:
        started = time.perf_counter()
        codes = _wait(alone.start(lambda change: print(change, file=lines)))
    if any(codes) or not alone.is_finished:
        raise SystemExit(alone.log)
    seconds = time.perf_counter() - started
    return alone.left(), seconds, len(counts.read_text().splitlines())


def kill_at(trial: Trial, moments: Sequence[str]) -> tuple[str, str]:
    """Begin, and kill at each of `moments` in turn; what was done, and what went wrong, if anything."""
    told: list[str] = []
    for moment in moments:
        pids = trial.start(at_named(MOMENTS[moment]))
        (code,) = _wait(pids[:1])
        _end_others(pids[1:])
        if code != -signal.SIGKILL:
            return "; ".join(told), f"not killed at the moment {moment}: exit code {code}"
        told.append(f"{moment}, {_place(trial)}")
    return "; ".join(told), ""


def run_case(trial: Trial, *, count: int, seed: int, moments: Sequence[str]) -> int:
    """Trials like `trial`, in directories below its own; how many went well."""
    wanted, seconds, changes = measure(replace(trial, directory=trial.directory / "alone"))
    print(f"left alone: {seconds:.1f} s, {changes} changes of files", flush=True)
    draw, good = random.Random(f"{seed} {trial.directory.name}"), 0
    for number in range(1 if moments else count):
        tried = replace(trial, directory=trial.directory / str(number))
        if moments:
            done, wrong = kill_at(tried, moments)
        else:
            options: dict[str, Any] = {"seconds": seconds, "changes": changes, "by_change": bool(number % 2)}
            done, wrong = kill_randomly(tried, draw, **options), ""
            if not tried.is_finished:
                done += f"; {kill_randomly(tried, draw, **options)}"
        wrong = wrong or tried.finish() or _differences(tried.left(), wanted)
        good += not wrong
        print(f"{number + 1}: killed {done} → {wrong or 'same'}", flush=True)
        shutil.rmtree(tried.directory)
    return good


def _import_once() -> None:
    """What every process needs, so that it starts at once."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import edgetune.training.run  # noqa: F401
    from edgetune.training.methods.qlora import require_bitsandbytes

    require_bitsandbytes()


def main(words: Sequence[str] | None = None) -> int:
    """Try the cases that the command line, or `words`, names; 1 when one trial ended otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["lora"], help=f"all, {', '.join(CASES)}")
    parser.add_argument("-n", type=int, default=30, help="trials of each case [30]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--at", nargs="+", choices=MOMENTS, default=[], help="kill one run at these moments, in this order, instead"
    )
    given = parser.parse_args(words)
    _import_once()

    good, names = 0, list(CASES) if given.cases == ["all"] else given.cases
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            directory = Path(scratch, name)
            print(f"== {name}", flush=True)
            # In a process of its own: what has computed anything must not be forked.
            with get_context("fork").Pool(1) as pool:
                command = pool.apply(make_case, (name, directory))
            trial = Trial(command, directory, CASES[name].processes)
            good += run_case(trial, count=given.n, seed=given.seed, moments=given.at)
    wanted = len(names) * (1 if given.at else given.n)
    print(f"{good} of {wanted} came to what a run left alone leaves")
    return int(good != wanted)


if __name__ == "__main__":
    raise SystemExit(main())
