"""Training on a base of 0.5 B parameters that is kept quantized: does it learn, and in how much memory.

    python -m benchmarks.quantized [NAME …] [--steps N] [--write]

QLoRA on the checkpoint, and LoRA on its Q4_K_M and Q8_0 files, on short rows of gsm8k. Prints the held-out loss before
and after, the peak memory of the whole process, and what it may be at most: 1.3 times the base's size beside what the
plan says of adapter, activations, loss and libraries. Weights are random, so that the loss starts near log of the
vocabulary's size, 11.9. `--write` puts the rows that were run into the table of docs/training-on-gguf.md.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.job import REPOSITORY
from benchmarks.llama_cpp import BUILD_DIR
from benchmarks.plan import gguf, qwen_0_5b, run_job

DATA = REPOSITORY.parent / "shared" / "data" / "datasets" / "gsm8k"
PAGE = REPOSITORY / "docs" / "training-on-gguf.md"
_TABLE = re.compile(r"(?<=<!-- benchmarks/quantized.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
_HEAD = "| base, 0.5 B | held-out loss before | after | peak memory | at most |\n|---|---|---|---|---|\n"
CASES = {
    "QLoRA": (qwen_0_5b, "qlora"),
    "Q4_K_M": (gguf("Q4_K_M"), "lora"),
    "Q8_0": (gguf("Q8_0"), "lora"),
}


def main() -> None:
    """Train and print; see the module's own words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    given = parser.parse_args()
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    for name in given.names or CASES:
        row = measure(name, given.steps)
        print(row, flush=True)
        if given.write:
            page = PAGE.read_text(encoding="utf-8")
            found = _TABLE.search(page)
            assert found is not None, f"{PAGE} has no place for the table"
            rows = {line.split(" | ")[0]: line for line in (*found[0].splitlines()[2:], row)}
            PAGE.write_text(_TABLE.sub(_HEAD + "\n".join(rows.values()) + "\n", page), encoding="utf-8")


def measure(name: str, steps: int) -> str:
    """A row of the table."""
    make, method = CASES[name]
    with tempfile.TemporaryDirectory(dir=BUILD_DIR) as scratch:
        for split, source, count in (("train", "train", steps), ("valid", "test", 4)):
            with (DATA / f"{source}.jsonl").open(encoding="utf-8") as file:
                lines = sorted(islice(file, 200), key=len)[:count]
            (Path(scratch) / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        settings: dict[str, Any] = {"model": make(), "data": [scratch], "out": str(Path(scratch) / "run")}
        settings |= {"method": method, "steps": steps, "batch_size": 1, "max_length": 128, "lr": 2e-3, "samples": 0}
        planned, _ = run_job("plan", settings)
        metrics, peak = run_job("train", settings)
    at_most = planned["memory_bytes"] + 0.3 * planned["memory"]["weights"]
    losses = f"{metrics['valid_before_loss']:.2f} | {metrics['valid_loss']:.2f}"
    return f"| {name} | {losses} | {peak / 2**20:,.0f} MiB | {at_most / 2**20:,.0f} MiB |"


if __name__ == "__main__":
    main()
