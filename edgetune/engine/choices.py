"""What the sampler saw → a token's choice as values for people, made when somebody looks at it.

Most of the tokens of a reply are never looked at, and twenty values for each of them would cost a small model a part of
its speed. Chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.engine.sampler import Seen

Piece = Callable[[int], bytes]
"""Token → the bytes it stands for."""


class Alternatives(Sequence[Candidate]):
    """The likeliest tokens at one place, best first; equal to any sequence of the same candidates."""

    __slots__ = ("_made", "_piece", "_seen")

    def __init__(self, seen: Seen, piece: Piece) -> None:
        self._seen, self._piece = seen, piece
        self._made: tuple[Candidate, ...] | None = None

    def __len__(self) -> int:
        return len(self._seen.tokens) - 1

    @overload
    def __getitem__(self, index: int) -> Candidate: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...

    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        if self._made is None:
            self._made = as_candidates(self._seen, self._piece)
        return self._made[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


def as_choice(token: int, seen: Seen | None, piece: Piece, *, start: int, end: int) -> TokenChoice:
    """The choice of `token`, whose text is that from `start` to `end`; it was given when nothing was `seen`."""
    if seen is None:
        return TokenChoice(token, start, end, 1.0, 1.0)
    chances = float(seen.probabilities[-1]), float(seen.sampled[-1])
    return TokenChoice(token, start, end, *chances, Alternatives(seen, piece))


def as_candidates(seen: Seen, piece: Piece) -> tuple[Candidate, ...]:
    """The likeliest tokens of a choice as values for people."""
    rows = zip(seen.tokens[:-1].tolist(), seen.probabilities.tolist(), seen.sampled.tolist(), strict=False)
    return tuple(
        Candidate(token, piece(token).decode(errors="replace"), before, float(after)) for token, before, after in rows
    )
