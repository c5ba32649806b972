"""The merges of a BPE, from either spelling that tokenizer.json has: "left right", or [left, right]."""

from __future__ import annotations

from typing import Any


def merge_pairs(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs, from either spelling that tokenizer.json has."""
    if merges and isinstance(merges[0], str):
        return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    return [(left, right) for left, right in merges]


def merge_lines(merges: list[Any]) -> list[str]:
    """Merges as "left right", from either spelling; a space inside a part is written as its byte letter."""
    if merges and isinstance(merges[0], str):
        return merges
    if any(" " in left or " " in right for left, right in merges):
        merges = [(left.replace(" ", "Ġ"), right.replace(" ", "Ġ")) for left, right in merges]
    return [f"{left} {right}" for left, right in merges]
