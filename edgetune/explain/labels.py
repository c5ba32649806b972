"""What a head that gives labels or a number says, as a page shows it: after blocks, at the end, and of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.lens import divergence
from edgetune.explain.page import Guess, Lensed
from edgetune.head import Head, sigmoid, softmax

Rows = NDArray[np.float32]
MOST_LEFT_OUT = 64
"""Of a longer text, single tokens are not left out one after the other."""


class Labelled:
    """Outputs of a head → labels; remembers the base's answers to compare with."""

    def __init__(self) -> None:
        self._base: Rows | None = None

    def after_blocks(self, head: Head, heard: Rows | None, *, specs: Sequence[Any]) -> list[Lensed]:
        """`heard` is what the head makes of the state after every block, (blocks, outputs); `specs` are adapters."""
        if heard is None:
            return []
        kl: list[float | None] = [None] * len(heard)
        if not specs:
            self._base = heard
        elif self._base is not None and head.task == "classification" and self._base.shape == heard.shape:
            kl = divergence(self._base, heard).tolist()
        return [Lensed(_guesses(head, row), kl_from_base=value) for row, value in zip(heard, kl, strict=True)]

    def answer(self, head: Head, logits: Rows) -> dict[str, Any]:
        """Fields of a run: scores and logits by label."""
        names = labels_of(head, len(logits))
        return {
            "scores": dict(zip(names, map(float, probabilities(head, logits)), strict=True)),
            "logits": dict(zip(names, map(float, logits), strict=True)),
        }


def labels_of(head: Head, count: int) -> list[str]:
    """What the head's outputs are called."""
    if head.task == "regression":
        return ["value"] if count == 1 else [f"value {number}" for number in range(count)]
    return list(head.labels) or [f"LABEL_{number}" for number in range(count)]


def probabilities(head: Head, logits: Rows) -> Rows:
    """What the outputs mean: probabilities, or the numbers themselves."""
    return logits if head.task == "regression" else sigmoid(logits) if head.task == "multilabel" else softmax(logits)


def token_effects(
    head: Head, logits: Rows, score: Callable[[list[list[int]]], Rows], ids: Sequence[int], is_fixed: Sequence[bool]
) -> tuple[float, ...]:
    """For each of `ids`: what the likeliest label's probability, or the value, loses without it.

    `score` gives the head's outputs of several texts. Tokens around the text, which `is_fixed`, stay and have none;
    a text with too many tokens, or a single one, has no effects at all.
    """
    free = [place for place, stays in enumerate(is_fixed) if not stays]
    if not 1 < len(free) <= MOST_LEFT_OUT:
        return ()
    rows = score([[*ids[:place], *ids[place + 1 :]] for place in free])
    best = 0 if head.task == "regression" else int(logits.argmax())
    whole = float(probabilities(head, logits)[best])
    effects = dict(zip(free, (whole - probabilities(head, row)[best] for row in rows), strict=True))
    return tuple(float(effects.get(place, 0.0)) for place in range(len(ids)))


def _guesses(head: Head, logits: Rows) -> tuple[Guess, ...]:
    names, shares = labels_of(head, len(logits)), probabilities(head, logits)
    best = range(len(names)) if head.task == "regression" else np.argsort(-shares, kind="stable")[:5].tolist()
    return tuple(Guess(int(number), names[number], float(shares[number])) for number in best)
