"""Training killed with SIGKILL and resumed, again and again: the same adapter, to the last byte, or what differs.

    python -m benchmarks.kill [-n 30] [CASE…]      CASE: lora, dora, qlora, houlsby, full, dpo; default: lora

Every trial trains pocket on its demos with `edgetune train`, in a process of its own that is killed at a random moment;
every second trial before a random change of a file (of the run, or of the cache of tokens) instead, so that the short
moments of writing are met. The run that goes on is killed again, and then resumed until it is done. `--at MOMENT` kills
at a named moment instead. Exits with 1 where an adapter, or the log of losses, is not that of a run left alone.

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
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "models" / "pocket"
STEPS = 8

CASES: dict[str, list[str]] = {
    "lora": ["--dropout", "0.1", "--metric", "loss"],
    "dora": ["--method", "dora"],
    "qlora": ["--method", "qlora"],
    "houlsby": ["--method", "houlsby"],
    "full": ["--method", "full", "--lr", "1e-5"],
    "dpo": ["--task", "dpo", "--lr", "2e-5"],
}

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

    @property
    def run_dir(self) -> Path:
        """The run."""
        return self.directory / "run"

    def start(self, watch: Watch | None = None) -> int:
        """Begin, or go on; the id of the process that does."""
        record = self.run_dir / "edgetune.json"
        words = ["train", "--resume", str(self.run_dir)] if record.is_file() else [*self.words, "-o", str(self.run_dir)]
        self.directory.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 99
        try:
            os.environ["EDGETUNE_HOME"] = str(self.directory / "home")
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

    def finish(self) -> str:
        """Go on until it is done; what went wrong, if anything."""
        if not self.is_finished and (code := _wait(self.start())):
            last = (self.directory / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            return f"exit code {code}: {' '.join(last)}"
        return "" if self.is_finished else "not finished"

    def left(self) -> dict[str, Any]:
        """What must not depend on kills: trained weights, losses by step, names of files."""
        weights = [*self.run_dir.glob("*.safetensors")]
        lines = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return {
            "adapter": {path.name: sha256(path.read_bytes()).hexdigest() for path in weights},
            "losses": [(line["step"], line["split"], line["loss"]) for line in lines],
            "files": sorted(path.name for path in self.run_dir.iterdir()),
        }


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


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
    if by_change:
        pid = trial.start(at_change(number := draw.randint(1, changes)))
        what = f"change {number}"
    else:
        pid, moment = trial.start(), draw.uniform(0, seconds)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        what = f"{moment:.2f} s"
    killed = _wait(pid) == -signal.SIGKILL
    return f"{what}, {_place(trial)}" if killed else "after its end"


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


def measure(words: Sequence[str], directory: Path) -> tuple[dict[str, Any], float, int]:
    """A run left alone: what it leaves, its seconds, and how many changes it makes."""
    directory.mkdir(parents=True)
    counts = directory / "changes"
    lines = counts.open("w", buffering=1)
    alone = Trial(words, directory / "alone")
    started = time.perf_counter()
    code = _wait(alone.start(lambda change: print(change, file=lines)))
    if code or not alone.is_finished:
        raise SystemExit((alone.directory / "log").read_text(encoding="utf-8", errors="replace"))
    seconds = time.perf_counter() - started
    return alone.left(), seconds, len(counts.read_text().splitlines())


def run_case(words: Sequence[str], directory: Path, *, count: int, seed: int, moments: Sequence[str]) -> int:
    """Trials of one case; how many went well."""
    wanted, seconds, changes = measure(words, directory)
    print(f"left alone: {seconds:.1f} s, {changes} changes of files", flush=True)
    draw, good = random.Random(seed), 0
    for number in range(len(moments) or count):
        trial = Trial(words, directory / str(number))
        if moments:
            code = _wait(trial.start(at_named(MOMENTS[moments[number]])))
            told = [f"{moments[number]}, {_place(trial)}" if code == -signal.SIGKILL else f"not killed ({code})"]
            wrong = "" if code == -signal.SIGKILL else "the moment did not come"
        else:
            options: dict[str, Any] = {"seconds": seconds, "changes": changes, "by_change": bool(number % 2)}
            told, wrong = [kill_randomly(trial, draw, **options)], ""
            if not trial.is_finished:
                told.append(kill_randomly(trial, draw, **options))
        wrong = wrong or trial.finish() or _differences(trial.left(), wanted)
        good += not wrong
        print(f"{number + 1}: killed {'; '.join(told)} → {wrong or 'same'}", flush=True)
        shutil.rmtree(trial.directory)
    return good


def write_pairs(directory: Path) -> Path:
    """Pairs of the demos' replies: a row's own, and the next row's."""
    directory.mkdir()
    for split, count in (("train", 40), ("valid", 8)):
        with (POCKET / "demos" / "persona" / f"{split}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line)["messages"] for line, _ in zip(file, range(count + 1), strict=False)]
        pairs = [
            {"prompt": row[0]["content"], "chosen": row[-1]["content"], "rejected": other[-1]["content"]}
            for row, other in pairwise(rows)
            if row[-1] != other[-1]
        ]
        (directory / f"{split}.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    return directory


def _import_once() -> None:
    """What every process needs, so that it starts at once."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import edgetune.training.run  # noqa: F401
    from edgetune.training.methods.qlora import require_bitsandbytes

    require_bitsandbytes()


def main() -> None:
    """Try the cases; exit with 1 when one trial ended otherwise."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["lora"], help=", ".join(CASES))
    parser.add_argument("-n", type=int, default=30, help="trials of each case [30]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", nargs="+", choices=MOMENTS, default=[], help="kill at these moments instead")
    parser.add_argument("-m", "--model", type=Path, default=POCKET)
    parser.add_argument("-d", "--data", nargs="*", type=Path, help="default: the demos of pocket")
    given = parser.parse_args()
    _import_once()

    with tempfile.TemporaryDirectory() as name:
        demos = [POCKET / "demos" / demo / "train.jsonl" for demo in ("persona", "tickets")]
        good = wanted = 0
        for case in given.cases:
            data = given.data or ([write_pairs(Path(name, "pairs"))] if case == "dpo" else demos)
            words = ["train", "-m", str(given.model), "--steps", str(STEPS), "--save-every", "2", *CASES[case]]
            for path in data:
                words += ["-d", str(path)]
            print(f"== {case}", flush=True)
            good += run_case(words, Path(name, case), count=given.n, seed=given.seed, moments=given.at)
            wanted += len(given.at) or given.n
    print(f"{good} of {wanted} came to the same adapter")
    raise SystemExit(good != wanted)


if __name__ == "__main__":
    main()
