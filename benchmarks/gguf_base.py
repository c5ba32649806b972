"""What training on the file that serves is worth: held-out loss in llama.cpp of adapters trained two ways.

    python -m benchmarks.gguf_base [TYPE…] [--data tickets|alpaca|gsm8k] [--seeds 3] [--write]

One adapter is trained on the bf16 checkpoint and served on a quantized file, the other is trained on that file. Rows,
their order, the adapter's start and the steps are the same; a seed changes order and start. The loss is over the
learned tokens of the test rows, computed by llama.cpp. The difference is taken within each seed; ± is the standard
error of its mean over the seeds. BF16 is the control: the file holds the checkpoint's own numbers, and what differs
there is what rounding alone comes to after so many steps. `--write` puts the rows into docs/training-on-gguf.md after
every seed, in place of those of the same type and data.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgetune.data import Tokenized, load_tokenizer, read_dataset, tokenize
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.export import export_adapter, export_base
from edgetune.training.run import train
from edgetune.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "models" / "pocket"
SHARED = ROOT.parent / "shared" / "data" / "datasets"
PAGE = ROOT / "docs" / "training-on-gguf.md"
TYPES = ("Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "BF16")
_BEGIN, _END = "<!-- benchmarks/gguf_base.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Work:
    """What is learned, and how."""

    steps: int
    lr: float
    learned: int
    """Rows to learn."""
    held: int
    """Rows whose loss is measured."""


WORK = {"tickets": Work(100, 2e-4, 600, 60), "alpaca": Work(100, 2e-4, 400, 60), "gsm8k": Work(100, 2e-4, 400, 60)}
"""Data, by name."""


def rows(name: str) -> tuple[list[str], list[str]]:
    """Rows to learn and rows held out of the data `name`, as lines of JSON."""
    work = WORK[name]
    if name == "alpaca":
        path = SHARED / "llama-factory-demos" / "alpaca_en_demo.json"
        lines = [json.dumps(row, ensure_ascii=False) for row in json.loads(path.read_text(encoding="utf-8"))]
        random.Random(0).shuffle(lines)
        return lines[work.held :][: work.learned], lines[: work.held]
    folder = POCKET / "demos" / "tickets" if name == "tickets" else SHARED / "gsm8k"
    learned, held = ((folder / f"{one}.jsonl").read_text(encoding="utf-8").splitlines() for one in ("train", "test"))
    return learned[: work.learned], held[: work.held]


class Bench:
    """The checkpoint, its quantized files and one set of data."""

    def __init__(self, folder: Path, data: str) -> None:
        self.folder, self.work = folder, WORK[data]
        self.data = folder / data
        self.data.mkdir()
        for split, lines in zip(("train", "test"), rows(data), strict=True):
            (self.data / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        dataset = read_dataset([self.data], has_template=True, splits=("train", "test"))
        held = replace(dataset, examples={"train": dataset.examples["test"]})
        self.held: Sequence[Tokenized] = tokenize(held, load_tokenizer(POCKET), max_length=256)["train"].sequences

    def quantized(self, kind: str) -> Path:
        """The checkpoint as a file of type `kind`."""
        path = self.folder / f"{kind}.gguf"
        return path if path.exists() else export_base(POCKET, path, quant=kind).path

    def adapter(self, base: Path, seed: int) -> Path:
        """A GGUF adapter trained on `base`, the checkpoint or a file."""
        settings = TrainSettings(
            model=str(base),
            data=(str(self.data / "train.jsonl"),),
            out=str(self.folder / f"{base.stem}-{seed}"),
            steps=self.work.steps,
            lr=self.work.lr,
            seed=seed,
            max_length=256,
            valid_share=0.0,
            samples=0,
            save_every=self.work.steps,
        )
        run = train(settings)
        return export_adapter(run.path, run.path.with_suffix(".gguf"), base_dir=base, outtype="f16").path

    def loss(self, base: Path, lora: Path | None) -> float:
        """Mean negative log-likelihood of the learned tokens of the held-out rows, in nats, in llama.cpp."""
        total, learned = 0.0, 0
        with LlamaEngine.open(base, ctx_size=512, threads=1, lora=[LoraSpec(lora)] if lora else []) as engine:
            for sequence in self.held:
                logits = engine.logits(sequence.ids.tolist()).astype(np.float64)
                logits -= logits.max(axis=-1, keepdims=True)
                logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
                places = np.flatnonzero(sequence.learned[1:])
                total -= logits[places, sequence.ids[places + 1]].sum()
                learned += len(places)
        return float(total / learned)


def measure(bench: Bench, kind: str, general: Path, seed: int) -> tuple[float, float]:
    """The losses on a file of type `kind` of the adapter `general`, and of one that is trained on that file."""
    base = bench.quantized(kind)
    found = bench.loss(base, general), bench.loss(base, bench.adapter(base, seed))
    print(f"seed {seed}, {kind}: checkpoint {found[0]:.4f}, file {found[1]:.4f}", flush=True)
    return found


def line(kind: str, data: str, before: float, losses: Sequence[tuple[float, float]]) -> str:
    """A row of the table."""
    differences = np.array([general - own for general, own in losses])
    error = f" ± {differences.std(ddof=1) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
    means = [f"{mean:.4f}" for mean in np.mean(losses, axis=0)]
    cells = [kind, data, f"{before:.3f}", *means, f"{differences.mean():+.4f}{error}", str(len(losses))]
    return f"| {' | '.join(cells)} |"


def write(lines: Sequence[str]) -> None:
    """Put `lines` into the page's table, in place of rows of the same type and data."""
    head, rest = PAGE.read_text(encoding="utf-8").split(_BEGIN)
    table, tail = rest.split(_END, 1)
    kept = table.strip().splitlines()
    for new in lines:
        names = new.split("|")[1:3]
        kept = [*(row for row in kept if row.split("|")[1:3] != names), new]
    PAGE.write_text(f"{head}{_BEGIN}\n" + "\n".join(kept) + f"\n{_END}{tail}", encoding="utf-8")


def main() -> None:
    """Measure the types named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=", ".join(TYPES))
    parser.add_argument("--data", choices=WORK, default="tickets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"put the rows into {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    kinds: Sequence[str] = given.types or TYPES
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.data)
        before = {kind: bench.loss(bench.quantized(kind), None) for kind in kinds}
        for seed in range(given.seeds):
            general = bench.adapter(POCKET, seed)
            for kind in kinds:
                found[kind].append(measure(bench, kind, general, seed))
            lines = [line(kind, given.data, before[kind], found[kind]) for kind in kinds]
            print("\n".join(lines), flush=True)
            if given.write:
                write(lines)


if __name__ == "__main__":
    main()
