"""What each method learns from the same real rows, and what that takes: pocket on alpaca, a table in docs/methods.md.

    python -m benchmarks.methods [METHOD…] [--write]

160 instructions are learned in one pass of 40 steps, 40 are held out; each method has a learning rate that is usual for
it, in proportion to LoRA's. Every run is a process of its own: speed is tokens by a second of its processor time (so
that what else the machine does counts little), one thread, f32; memory is the most it held, libraries included.
`--write` replaces rows of the same name.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT.parent / "shared" / "data" / "datasets" / "llama-factory-demos" / "alpaca_en_demo.json"
PAGE = ROOT / "docs" / "methods.md"
HELD_OUT, LEARNED = 40, 160
COMMON: dict[str, Any] = {"max_length": 256, "epochs": 1, "dtype": "f32", "samples": 0, "save_every": 10_000}
_BEGIN, _END = "<!-- benchmarks/methods.py -->", "<!-- end -->"

RATES = {
    "lora": 2e-3,
    "rslora": 5e-4,
    "lora+": 5e-4,
    "dora": 2e-3,
    "pissa": 5e-4,
    "olora": 5e-4,
    "qlora": 2e-3,
    "full": 3e-4,
    "houlsby": 2e-3,
    "pfeiffer": 2e-3,
    "prompt": 5e-2,
}
"""Methods and their learning rates. Scales of alpha / √rank, and B at 16 times the rate, want about a quarter."""


@dataclass(frozen=True)
class Found:
    """One run."""

    before: float
    """Held-out loss."""
    after: float
    parameters: int
    speed: float
    """Tokens by a second of processor time."""
    memory: int
    """Bytes at the highest."""


def write_rows(directory: Path) -> Path:
    """The rows to learn and those held out."""
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    directory.mkdir()
    for name, part in (("valid", rows[:HELD_OUT]), ("train", rows[HELD_OUT : HELD_OUT + LEARNED])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return directory


def run(method: str, data: Path, out: Path) -> Found:
    """Train in a process of its own, forked from this one."""
    result = out.with_suffix(".json")
    if (pid := os.fork()) == 0:
        code = 1
        try:
            result.write_text(json.dumps(_train(method, data, out)), encoding="utf-8")
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{method} failed")
    return Found(**json.loads(result.read_text(encoding="utf-8")))


def _train(method: str, data: Path, out: Path) -> dict[str, Any]:
    import torch

    from edgetune.events import Event, Metrics
    from edgetune.training import TrainSettings, train
    from edgetune.training.prepare import plan, prepare

    torch.set_num_threads(1)
    model = str(ROOT / "models" / "pocket")
    settings = TrainSettings(model=model, data=(str(data),), out=str(out), method=method, lr=RATES[method], **COMMON)
    steps: list[tuple[float, float]] = []

    def note(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train":
            steps.append((time.process_time(), event.values["tokens"]))

    metrics = train(settings, sink=note).metrics
    # From the second step to the last: nothing is measured or saved in between.
    first, last = steps[1], steps[-1]
    return {
        "before": metrics["valid_before_loss"],
        "after": metrics["valid_loss"],
        "parameters": plan(settings, prepare(settings)).trainable_parameters,
        "speed": (last[1] - first[1]) / (last[0] - first[0]),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def line(method: str, found: Found, lora_speed: float) -> str:
    """A row of the table."""
    cells = [
        f"`{method}`",
        f"{RATES[method]:g}",
        f"{found.parameters / 1e6:.2f} M",
        f"{found.before:.3f} → {found.after:.3f}",
        f"{found.speed / lora_speed:.2f}",
        f"{found.memory / 2**20:.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def write(lines: Sequence[str]) -> None:
    """Put `lines` into the page's table, in place of rows of the same method."""
    head, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    table, tail = rest.split(_END)
    rows = table.strip().splitlines()
    for new in lines:
        rows = [*(row for row in rows if row.split("|")[1] != new.split("|")[1]), new]
    PAGE.write_text(f"{head}{_BEGIN}\n" + "\n".join(rows) + f"\n{_END}{tail}", encoding="utf-8")


def main() -> None:
    """Measure the methods named, or all of them; lora is always measured, for its speed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(RATES))
    parser.add_argument("--write", action="store_true", help="put the rows into docs/methods.md")
    given = parser.parse_args()
    import peft  # noqa: F401  (once, for all processes)
    import torch  # noqa: F401

    lines, lora_speed = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        os.environ["EDGETUNE_HOME"] = f"{name}/home"
        data = write_rows(Path(name, "data"))
        for method in dict.fromkeys(["lora", *(given.methods or RATES)]):
            found = run(method, data, Path(name, method))
            lora_speed = lora_speed or found.speed
            lines.append(line(method, found, lora_speed))
            print(lines[-1], flush=True)
    if given.write:
        write(lines)


if __name__ == "__main__":
    main()
