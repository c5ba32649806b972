"""Labels of 1,000 texts of mixed length: edgetune against transformers' pipeline and plain torch, both float32.

The random model of MiniLM's shape that benchmarks/embed.py makes, with a pooler and a head of three labels. The
pipeline runs in batches of 32 in the texts' order, plain torch in batches of 32 of similar length. Every peer runs in a
process of its own, in turn with the others, and all probabilities are compared. Prints JSON; a ratio is the median of
the rounds', against the pipeline.

    python -m benchmarks.classify [--build-dir DIR] [--rounds 3] [--texts 1000] [--threads N]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import embed

NAME = "minilm-classifier"
LABELS = ("red", "green", "blue")
PEERS = ("pipeline", "plain_torch", "llama", "torch")
_GOALS = {"llama": 1.3, "torch": 2.5}
_BATCH = 32


def main() -> None:
    """Measure every peer, or with --peer one, on the texts of standard input."""
    embed.command_line(__doc__ or "", PEERS, measure, run_peer)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all peers, in turn; texts per second."""
    import numpy as np

    checkpoint = model_dir(options.build_dir)
    texts = "\n".join(embed.mixed_texts(checkpoint, options.texts))
    rates: dict[str, list[float]] = {peer: [] for peer in PEERS}
    with tempfile.TemporaryDirectory(dir=options.build_dir) as scratch:
        outs = {peer: Path(scratch) / f"{peer}.npy" for peer in PEERS}
        for _ in range(options.rounds):
            for peer in PEERS:
                python = Path(sys.executable)
                rates[peer].append(embed.run("benchmarks.classify", python, peer, texts, outs[peer], options))
                print(f"{peer}: {rates[peer][-1]:.0f} texts/s", file=sys.stderr)
        found = {peer: np.load(out) for peer, out in outs.items()}
    base = rates[PEERS[0]]
    return {
        "texts": options.texts,
        "threads": options.threads,
        "texts_per_second": {peer: statistics.median(values) for peer, values in rates.items()},
        "ratio": {
            peer: statistics.median(mine / other for mine, other in zip(rates[peer], base, strict=True))
            for peer in PEERS[1:]
        },
        "goal": _GOALS,
        "largest_difference": {peer: float(np.abs(found[peer] - found[PEERS[0]]).max()) for peer in PEERS[1:]},
    }


def run_peer(options: argparse.Namespace) -> None:
    """Classify the lines of standard input; prints seconds, the model's loading and first texts aside."""
    import numpy as np

    texts = sys.stdin.read().split("\n")
    classify = _OPENERS[options.peer](options.build_dir, options.threads)
    classify(texts[:16])
    began = time.perf_counter()
    found = classify(texts)
    print(time.perf_counter() - began)
    np.save(options.out, np.asarray(found, np.float32))


def open_pipeline(build_dir: Path, threads: int) -> Any:
    """transformers' own way to labels with probabilities."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    settings = {"device": "cpu", "batch_size": _BATCH, "top_k": None, "truncation": True}
    pipeline: Any = transformers.pipeline("text-classification", str(build_dir / NAME), **settings)

    def classify(texts: list[str]) -> list[list[float]]:
        scores = [{one["label"]: one["score"] for one in row} for row in pipeline(texts)]
        return [[row[label] for label in LABELS] for row in scores]

    return classify


def open_plain_torch(build_dir: Path, threads: int) -> Any:
    """The model called by hand, texts of similar length together."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(build_dir / NAME)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(build_dir / NAME).eval()

    def classify(texts: list[str]) -> list[list[float]]:
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        rows: dict[int, list[float]] = {}
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            inputs = tokenizer([texts[at] for at in part], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                rows |= dict(zip(part, model(**inputs).logits.softmax(-1).tolist(), strict=True))
        return [rows[at] for at in range(len(texts))]

    return classify


def open_llama(build_dir: Path, threads: int) -> Any:
    """edgetune through llama.cpp."""
    from edgetune.engine import open_encoder

    return _scores(open_encoder(build_dir / f"{NAME}-F16.gguf", threads=threads))


def open_torch(build_dir: Path, threads: int) -> Any:
    """edgetune in torch, in the type it chooses here."""
    from edgetune.engine import open_encoder

    return _scores(open_encoder(build_dir / NAME, threads=threads))


def _scores(encoder: Any) -> Any:
    return lambda texts: [[one.scores[label] for label in LABELS] for one in encoder.classify(texts)]


_OPENERS = {"pipeline": open_pipeline, "plain_torch": open_plain_torch, "llama": open_llama, "torch": open_torch}


def model_dir(build_dir: Path) -> Path:
    """The random classifier, as a directory and as a GGUF; made once."""
    directory, gguf = build_dir / NAME, build_dir / f"{NAME}-F16.gguf"
    if not (directory / "config.json").is_file():
        _write_model(directory, embed.model_dir(build_dir))
    if not gguf.is_file():
        from edgetune.export import export_base

        export_base(directory, gguf, outtype="f16")
    return directory


def _write_model(directory: Path, encoder_dir: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(
        encoder_dir, id2label=dict(enumerate(LABELS)), label2id={label: at for at, label in enumerate(LABELS)}
    )
    with torch.no_grad():
        for layer in (model.bert.pooler.dense, model.classifier):
            layer.weight.normal_(0, layer.weight.shape[1] ** -0.5)
    model.save_pretrained(directory)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(encoder_dir / name, directory)


if __name__ == "__main__":
    main()
