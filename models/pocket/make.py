"""Makes pocket from nothing but this folder: tokenizer, demo datasets, weights, scores.

    python -m models.pocket.make [DIRECTORY]

One fixed seed; no network, no other data. `DIRECTORY` is this folder unless given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.pocket.evaluate import HERE, evaluate, table
from models.pocket.make_demos import make_demos
from models.pocket.make_tokenizer import make_tokenizer
from models.pocket.network import Shape
from models.pocket.train import Plan, train

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
    train(directory, Plan(), shape=Shape(vocabulary=tokenizer.get_vocab_size()))
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
