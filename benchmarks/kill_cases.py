"""What `benchmarks.kill` trains: a two-layer base and some rows for each method and task, made in a moment.

The texts are those of pocket's demos; the bases are random models of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgetune.library import embedded_model_dir

Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One way to train."""

    flags: str
    """Of `edgetune train`, beside the base and the data."""
    base: str = "llama"
    rows: Callable[[list[tuple[str, str]]], Rows] = lambda turns: ({"prompt": a, "completion": b} for a, b in turns)
    """Questions and answers → rows of the task."""
    count: int = 48
    """Rows to train on."""
    processes: int = 1


def _turns(split: str, count: int) -> list[tuple[str, str]]:
    demos = embedded_model_dir() / "demos"
    texts = [(demos / name / f"{split}.jsonl").read_text(encoding="utf-8") for name in ("tickets", "persona")]
    rows = [json.loads(line)["messages"] for line in "".join(texts).splitlines()[:count]]
    return [(row[0]["content"], row[-1]["content"]) for row in rows]


def _base(directory: Path, name: str) -> Path:
    from tests.checkpoints import write_checkpoint
    from tests.task_models import write_model

    if name in ("bert", "t5"):
        return write_model(directory / name, name)
    base = write_checkpoint(directory / "llama", "llama")
    if name == "gguf":
        from edgetune.export import export_base

        export_base(base, directory / "base.gguf", quant="Q4_K_M")
        return directory / "base.gguf"
    return base


def _pairs(turns: list[tuple[str, str]]) -> Rows:
    """A reply of its own and the next row's."""
    for (prompt, reply), (_, other) in pairwise(turns):
        if reply != other:
            yield {"prompt": prompt, "chosen": reply, "rejected": other}


def _judged(turns: list[tuple[str, str]]) -> Rows:
    """Replies found good and, of other rows, bad ones."""
    for row in _pairs(turns):
        yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}


def _labelled(turns: list[tuple[str, str]]) -> Rows:
    return ({"text": text, "label": json.loads(reply)["urgency"]} for text, reply in turns)


def _embedded(turns: list[tuple[str, str]]) -> Rows:
    return ({"anchor": text, "positive": reply} for text, reply in turns)


def _translated(turns: list[tuple[str, str]]) -> Rows:
    return ({"source": text, "target": reply} for text, reply in turns)


CASES: dict[str, Case] = {
    # So many rows that their tokens are cached.
    "lora": Case("--dropout 0.1 --metric loss", count=1200),
    "dora": Case("--method dora --dropout 0.1"),
    "lora+": Case("--method lora+"),
    "pissa": Case("--method pissa"),
    "olora": Case("--method olora"),
    "qlora": Case("--method qlora"),
    "houlsby": Case("--method houlsby --dropout 0.1"),
    "full": Case("--method full --lr 1e-5"),
    "prompt": Case("--method prompt --lr 1e-2"),
    "dpo": Case("--task dpo --lr 2e-5", rows=_pairs),
    "kto": Case("--task kto --lr 2e-5", rows=_judged),
    "seq2seq": Case("--task seq2seq --eval-texts 4 --metric chrf", "t5", _translated),
    "classification": Case("--task classification --metric accuracy", "bert", _labelled),
    "embedding": Case("--task embedding --metric loss", "bert", _embedded),
    "gguf": Case("", "gguf"),
    "ddp": Case("--dropout 0.1 --metric loss", processes=2),
    "fsdp": Case("--fsdp --batch-size 2", processes=2),
}


def make_case(name: str, directory: Path) -> list[str]:
    """The command line of a case, without where the run goes; its base and its data are made in `directory`."""
    case, data = CASES[name], directory / "data"
    data.mkdir(parents=True)
    for split, count in (("train", case.count), ("valid", 8)):
        lines = "".join(f"{json.dumps(row)}\n" for row in case.rows(_turns(split, count)))
        (data / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return ["train", "-m", str(_base(directory, case.base)), "-d", str(data), *case.flags.split()]
