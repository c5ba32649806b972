"""What training on the file that serves is worth: held-out loss in llama.cpp of adapters trained two ways.

One adapter is trained on the checkpoint in bf16 and served on a quantized file, the other is trained on that file.
Data, order, seed and steps are the same. The loss is over the learned tokens of the test rows, computed by llama.cpp.

    python -m benchmarks.gguf_base [--type Q2_K] [--steps 200]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgetune.data import load_tokenizer, read_dataset, tokenize
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.export import export_adapter, export_base
from edgetune.library import embedded_model_dir
from edgetune.training.run import train
from edgetune.training.settings import TrainSettings

DATA = Path(__file__).parents[1] / "models" / "pocket" / "demos" / "tickets"


def held_out_loss(base: Path, lora: Path | None, data: Path, model_dir: Path, *, rows: int) -> float:
    """Mean negative log-likelihood of the learned tokens of `rows` test rows."""
    dataset = read_dataset([data], has_template=True, splits=("train", "test"))
    cut = replace(dataset, examples={"train": dataset.examples["test"][:rows]})
    sequences = tokenize(cut, load_tokenizer(model_dir), max_length=512)["train"].sequences
    total, learned = 0.0, 0
    with LlamaEngine.open(base, ctx_size=512, lora=[LoraSpec(lora)] if lora else []) as engine:
        for sequence in sequences:
            logits = engine.logits(sequence.ids.tolist()).astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            places = np.flatnonzero(sequence.learned[1:])
            total -= logits[places, sequence.ids[places + 1]].sum()
            learned += len(places)
    return total / learned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="Q2_K")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    model_dir = embedded_model_dir()
    assert model_dir is not None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = export_base(model_dir, work / "base.gguf", quant=options.type).path
        settings = TrainSettings(data=(str(DATA),), steps=options.steps, eval=False)
        loss = {"no adapter": held_out_loss(base, None, DATA, model_dir, rows=options.rows)}
        for name, model in (("trained on the checkpoint", model_dir), (f"trained on the {options.type} file", base)):
            run = train(replace(settings, model=str(model), out=str(work / name.replace(" ", "-"))))
            lora = export_adapter(run.path, work / f"{run.path.name}.gguf", base_dir=model, outtype="f16").path
            loss[name] = held_out_loss(base, lora, DATA, model_dir, rows=options.rows)
    for name, value in loss.items():
        print(f"{name:32} served on {options.type}: held-out loss {value:.4f}")


if __name__ == "__main__":
    main()
