"""What `edgetune plan` and `--dry-run` say training takes, against the peak of real training.

    python -m benchmarks.plan [NAME …] [--write]

Each case is planned in a process of its own and trained for two steps in another, whose highest memory (of the whole
process, libraries and mapped files included) the operating system counts. Weights are random, which changes nothing.
`--write` puts the cases that were run into the table of docs/training-speed.md.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import job
from benchmarks.job import REPOSITORY
from benchmarks.llama_cpp import BUILD_DIR

TOKENIZERS = REPOSITORY.parent / "shared" / "data" / "tokenizers"
PAGE = REPOSITORY / "docs" / "training-speed.md"
_TABLE = re.compile(r"(?<=<!-- benchmarks/plan.py -->\n).*?(?=<!-- end -->)", re.DOTALL)
_HEAD = "| case | planned | measured | planned / measured |\n|---|---|---|---|\n"
_WORDS = ("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for")


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    model: Callable[[], str]
    """Makes the base, or finds it; what -m is given."""
    words: int
    """Words of a row."""
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "completion"
    """What the rows are."""


def main() -> None:
    """Plan, train, print; see the module's own words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of the names of the cases to run; all if none")
    parser.add_argument("--write", action="store_true", help=f"put them into {PAGE.name}")
    parser.add_argument("--job", nargs=2, metavar=("WHAT", "SETTINGS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        _job(*given.job)
        return
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if not given.names or any(name in case.name for name in given.names):
            planned, measured = compare(case)
            sizes = f"{planned / 2**20:,.0f} MiB | {measured / 2**20:,.0f} MiB"
            row = f"| {case.name} | {sizes} | {planned / measured:.2f} |"
            print(row, flush=True)
            if given.write:
                _write(case, row)


def compare(case: Case) -> tuple[int, int]:
    """Bytes that were planned, and those that training took."""
    with tempfile.TemporaryDirectory(dir=BUILD_DIR) as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in _rows(case)), encoding="utf-8")
        settings = {"model": case.model(), "data": [str(data)], "out": str(Path(scratch) / "run"), "steps": 2}
        settings |= {"eval": False, "batch_size": 1, "task": case.kind, **case.options}
        planned, _ = run_job("plan", settings)
        _, measured = run_job("train", settings)
    return planned["memory_bytes"], measured


def _rows(case: Case) -> list[dict[str, str]]:
    choose = random.Random(0)

    def text(words: int) -> str:
        return " ".join(choose.choices(_WORDS, k=words))

    make: dict[str, Callable[[], dict[str, str]]] = {
        "completion": lambda: {"prompt": text(case.words // 2), "completion": " " + text(case.words // 2)},
        "classification": lambda: {"text": text(case.words), "label": choose.choice(_WORDS[:4])},
        "seq2seq": lambda: {"source": text(case.words // 2), "target": text(case.words // 2)},
    }
    return [make[case.kind]() for _ in range(16)]


def run_job(what: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """What planning ("plan") or training ("train") has to say, and the peak memory of its process in bytes."""
    return job.run_job([sys.executable, "-m", "benchmarks.plan", "--job", what, json.dumps(settings)])


def _job(what: str, text: str) -> None:
    from edgetune.training import TrainSettings, plan, prepare, train

    values = json.loads(text)
    settings = TrainSettings(**{**values, "data": tuple(values["data"])})
    if what == "plan":
        print(json.dumps(asdict(plan(settings, prepare(settings)))))
    else:
        print(json.dumps(train(settings).metrics))


def _write(case: Case, row: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = _TABLE.search(page)
    assert found is not None, f"{PAGE} has no place for the table"
    rows = {line.split(" | ")[0]: line for line in (*found[0].splitlines()[2:], row)}
    ordered = [rows[f"| {known.name}"] for known in CASES if f"| {known.name}" in rows]
    PAGE.write_text(_TABLE.sub(lambda _: _HEAD + "".join(f"{line}\n" for line in ordered), page), encoding="utf-8")


def made_once(name: str, make: Callable[[Path], None]) -> str:
    """The path of what `make` writes, made now unless it is there."""
    path = BUILD_DIR / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=BUILD_DIR) as scratch:
            make(Path(scratch) / name)
            (Path(scratch) / name).rename(path)
    return str(path)


def _checkpoint(config: str, tokenizer: str, auto: str, **sizes: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import torch
        import transformers

        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(getattr(transformers, config)(**sizes))
        model.to(torch.bfloat16).save_pretrained(path)
        for source in (TOKENIZERS / tokenizer).iterdir():
            shutil.copyfile(source, path / source.name)

    return make


def _qwen_135m() -> str:
    from benchmarks.train import SHAPE

    return made_once("qwen2-135m-shaped", _checkpoint("Qwen2Config", "qwen2.5", "AutoModelForCausalLM", **SHAPE))


def qwen_0_5b() -> str:
    from benchmarks.models import QWEN_0_5B
    from benchmarks.train import SHAPE

    sizes = {**SHAPE, **QWEN_0_5B}
    return made_once("qwen2-0.5b-shaped", _checkpoint("Qwen2Config", "qwen2.5", "AutoModelForCausalLM", **sizes))


def gguf(quant: str) -> Callable[[], str]:
    def make(path: Path) -> None:
        from edgetune.export import export_base

        export_base(Path(qwen_0_5b()), path, quant=quant)

    return lambda: made_once(f"qwen2-0.5b-shaped-{quant}.gguf", make)


def _minilm() -> str:
    from benchmarks.embed import model_dir

    return str(model_dir(BUILD_DIR))


def _t5_small() -> str:
    return made_once("t5-small-shaped", _checkpoint("T5Config", "t5", "AutoModelForSeq2SeqLM"))


CASES = (
    Case("pocket, LoRA, batch 8", lambda: "pocket", 256, {"batch_size": 8}),
    Case("pocket, full", lambda: "pocket", 256, {"method": "full", "max_length": 256}),
    Case("135 M, LoRA, 256 tokens", _qwen_135m, 256, {"max_length": 256}),
    Case("135 M, LoRA, 4 × 256 tokens packed", _qwen_135m, 256, {"batch_size": 4, "max_length": 1024}),
    Case("135 M, LoRA, the same, checkpointing", _qwen_135m, 256,
         {"batch_size": 4, "max_length": 1024, "grad_checkpointing": "on"}),
    Case("135 M, LoRA, 4 × 256 tokens padded", _qwen_135m, 256,
         {"batch_size": 4, "max_length": 256, "packing": False}),
    Case("135 M, full, 256 tokens", _qwen_135m, 256, {"method": "full", "max_length": 256}),
    Case("135 M, QLoRA, 256 tokens", _qwen_135m, 256, {"method": "qlora", "max_length": 256}),
    Case("135 M, Houlsby, 256 tokens", _qwen_135m, 256, {"method": "houlsby", "max_length": 256}),
    Case("MiniLM, classification, LoRA, batch 8", _minilm, 128, {"batch_size": 8}, "classification"),
    Case("T5-small, seq2seq, LoRA, batch 4", _t5_small, 128, {"batch_size": 4}, "seq2seq"),
    Case("0.5 B, LoRA, 256 tokens", qwen_0_5b, 256, {"max_length": 256}),
    Case("0.5 B, QLoRA, 256 tokens", qwen_0_5b, 256, {"method": "qlora", "max_length": 256}),
    Case("0.5 B in Q4_K_M, LoRA, 256 tokens", gguf("Q4_K_M"), 256, {"max_length": 256}),
    Case("0.5 B in Q8_0, LoRA, 256 tokens", gguf("Q8_0"), 256, {"max_length": 256}),
)  # fmt: skip

if __name__ == "__main__":
    main()
