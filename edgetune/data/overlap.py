"""What the splits of a dataset share: repeated rows, rows that leak into what is measured, and rows to hold out.

Rows are the same when everything that is read of them is the same. Which rows are held out follows from their content
alone, so that it stays as it is when files are joined, sorted or grow. Reads no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from edgetune.events import Notice, Sink

LEAST_ROWS = 40
"""Different rows below which none are held out: they are needed more to learn from."""

MOST_ROWS = 256
"""Rows held out at most; more tell little."""

Rows = Sequence[tuple[str, Any]]
"""(place, example)."""


def hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """The rows left to train on and those held out; all and none when there are too few.

    Same rows stay together, and each label keeps a row to be learned from.
    """
    keys = [content_key(example) for _, example in rows]
    labels = {key: tuple(getattr(example, "labels", ())) for key, (_, example) in zip(keys, rows, strict=True)}
    if share <= 0 or len(labels) < LEAST_ROWS:
        return rows, ()
    wanted = min(MOST_ROWS, max(1, round(share * len(labels))))
    left = Counter(label for names in labels.values() for label in names)
    held: set[bytes] = set()
    for key in sorted(labels):
        if len(held) == wanted:
            break
        if all(left[label] > 1 for label in labels[key]):
            left.subtract(labels[key])
            held.add(key)
    # Of rows that are there several times, one is measured.
    measured = dict(zip(keys, rows, strict=True))
    kept = [row for key, row in zip(keys, rows, strict=True) if key not in held]
    return kept, [row for key, row in measured.items() if key in held]


@dataclass(frozen=True)
class Overlap:
    """What rows share."""

    repeated: int = 0
    """Training rows that repeat another one exactly."""
    leaked: Mapping[str, int] = field(default_factory=dict)
    """Split → its rows that are training rows too."""


def find_overlap(examples: Mapping[str, Rows], sink: Sink) -> Overlap:
    """Count the training rows that are there twice and those that other splits hold as well, and say so."""
    keys = {split: [content_key(example) for _, example in rows] for split, rows in examples.items()}
    train = keys.get("train", [])
    known = set(train)
    if repeated := len(train) - len(known):
        sink(Notice(f"train: {repeated:,} of {len(train):,} rows repeat another one exactly."))
    leaked = {split: sum(key in known for key in others) for split, others in keys.items() if split != "train"}
    for split, count in leaked.items():
        if count:
            text = f"{split}: {count:,} of {len(keys[split]):,} rows are training rows too and tell little."
            sink(Notice(text, "warning"))
    return Overlap(repeated, leaked)


def content_key(example: Any) -> bytes:
    """The same for the same content."""
    return blake2b(repr(example).encode("utf-8", "surrogatepass"), digest_size=16).digest()
