"""Makes pocket from nothing but this folder: tokenizer, demo datasets, weights, scores.

    python -m models.pocket.make [DIRECTORY]

One fixed seed; no network, no other data. `DIRECTORY` is this folder unless given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.pocket.evaluate import HERE, evaluate, table
from models.pocket.generate import WEIGHTS
from models.pocket.make_demos import make_demos
from models.pocket.make_tokenizer import make_tokenizer
from models.pocket.network import Shape
from models.pocket.train import Plan, train

# What comes out weak after the first plan is trained more in the second: arithmetic, lists, yes or no, echoes.
_SHIFTED = dict(zip(WEIGHTS, (3, 32, 14, 11, 20, 6, 20, 12, 5, 9), strict=True))
PLANS = (
    Plan(seed=0),
    Plan(seed=1, steps=1200, prompt_share=0.3, weights=_SHIFTED),
)
"""Trained one after the other, each from the weights before it, with a fresh optimizer and new conversations."""
_MARKS = ("<!-- scores -->\n", "<!-- end of scores -->")
"""What the table stands between in the card."""


def main() -> None:
    """Make the model in the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=HERE)
    make(parser.parse_args().directory)


def make(directory: Path) -> None:
    """Make everything in `directory`, and write the scores into the card."""
    directory.mkdir(parents=True, exist_ok=True)
    make_demos(directory / "demos")
    tokenizer = make_tokenizer(directory, seed=0)
    shape, start_path = Shape(vocabulary=tokenizer.get_vocab_size()), None
    for plan in PLANS:
        train(directory, plan, shape=shape, start_path=start_path)
        start_path = directory / "model.safetensors"
    for path in directory.glob("state-*.pt"):
        path.unlink()
    write_scores(directory, table(evaluate(directory)))


def write_scores(directory: Path, scores: str) -> None:
    """Put the table of scores into the card in `directory`, which starts as a copy of the one here."""
    start, end = _MARKS
    before, _, rest = (HERE / "README.md").read_text(encoding="utf-8").partition(start)
    card = before + start + scores + "\n" + end + rest.partition(end)[2]
    (directory / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
