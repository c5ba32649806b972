"""What the splits of a dataset share: repeated rows, rows that leak into what is measured, and rows to hold out.

Rows are the same when everything that is read of them is the same; preferences of one prompt belong together. Which
rows are held out follows from their content alone, so that it stays as it is when files are joined, sorted or grow.
Reads no files.
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

    Same rows stay together, as do preferences of one prompt, and each label keeps a row to be learned from.
    """
    keys = [_group_key(example) for _, example in rows]
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
    measured = {content_key(row[1]): row for key, row in zip(keys, rows, strict=True) if key in held}
    return [row for key, row in zip(keys, rows, strict=True) if key not in held], list(measured.values())


@dataclass(frozen=True)
class Overlap:
    """What rows share."""

    repeated: int = 0
    """Training rows that repeat another one exactly."""
    leaked: Mapping[str, int] = field(default_factory=dict)
    """Split → its rows that are training rows too; of preferences, those that have a training row's prompt."""


def find_overlap(examples: Mapping[str, Rows], sink: Sink) -> Overlap:
    """Count the training rows that are there twice and those that other splits hold as well, and say so."""
    train = examples.get("train", ())
    if repeated := len(train) - len({content_key(example) for _, example in train}):
        sink(Notice(f"train: {repeated:,} of {len(train):,} rows repeat another one exactly."))
    known = {_group_key(example) for _, example in train}
    leaked = {
        split: sum(_group_key(example) in known for _, example in rows)
        for split, rows in examples.items()
        if split != "train"
    }
    by_prompt = any(hasattr(example, "asked") for _, example in train[:1])
    what = "have a training row's prompt" if by_prompt else "are training rows too"
    for split, count in leaked.items():
        if count:
            text = f"{split}: {count:,} of {len(examples[split]):,} rows {what} and tell little."
            sink(Notice(text, "warning"))
    return Overlap(repeated, leaked)


def _group_key(example: Any) -> bytes:
    """The same for rows that do not belong into different splits."""
    return content_key(getattr(example, "asked", example))


def content_key(example: Any) -> bytes:
    """The same for the same content."""
    return blake2b(repr(example).encode("utf-8", "surrogatepass"), digest_size=16).digest()
