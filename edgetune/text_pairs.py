"""Two texts' tokens → one sequence with what a tokenizer puts around and between them, cut to a length.

The `tokenizers` library does this as well, but keeps every combination of what it cuts off either text, in memory that
grows with the product of their lengths. Training and the engine share it, so that both see the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class JoinedPair:
    """A pair of texts as an encoder takes it."""

    ids: list[int]
    types: list[int]
    """Which text each id is of, where the tokenizer tells them apart."""
    is_cut: bool
    """Whether something was left out to fit."""


@dataclass(frozen=True)
class PairLayout:
    """The tokens around two texts, and the types of everything."""

    before: list[int]
    between: list[int]
    after: list[int]
    types: tuple[list[int], int, list[int], int, list[int]]
    """Of the tokens before, of the first text, of the tokens between, of the second text, of those after."""

    @classmethod
    def of(cls, ids: Sequence[int], types: Sequence[int], sides: Sequence[int | None]) -> PairLayout:
        """Read from the ids of a pair; `sides` tells which text each is of, None for the tokens around them."""
        first = [at for at, side in enumerate(sides) if side == 0]
        second = [at for at, side in enumerate(sides) if side == 1]
        parts = (slice(0, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, len(ids)))
        before, between, after = (list(ids[part]) for part in parts)
        kinds = [list(types[part]) for part in parts]
        return cls(before, between, after, (kinds[0], types[first[0]], kinds[1], types[second[0]], kinds[2]))

    def join(self, first: Sequence[int], second: Sequence[int], max_tokens: int) -> JoinedPair:
        """The pair, the longer text cut first."""
        around = len(self.before) + len(self.between) + len(self.after)
        left, right = _lengths(len(first), len(second), max(0, max_tokens - around))
        is_cut = (left, right) != (len(first), len(second))
        ids = [*self.before, *first[:left], *self.between, *second[:right], *self.after]
        before, of_first, between, of_second, after = self.types
        types = [*before, *[of_first] * left, *between, *[of_second] * right, *after]
        return JoinedPair(ids, types, is_cut)


def _lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """What is left of two texts of these lengths in `room` tokens, as Hugging Face's "longest_first" cuts them."""
    if first + second <= room:
        return first, second
    shorter, longer = sorted((first, second))
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if first > second else (shorter, longer)
