"""Replies of an encoder-decoder in one batch: which texts go together, and how all of them advance token by token.

Texts of similar length share a batch, so that little of it is padding; their replies come back under the numbers they
were given. Evaluates nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from edgetune.engine.protocol import Generation


class Stepping(Generation, Protocol):
    """A reply that says when it has to be evaluated."""

    slot: Any
    """Where the engine keeps it; None after the end."""
    is_waiting: bool
    """Whether it has to be evaluated before the next step."""

    @property
    def source_tokens(self) -> int:
        """How many tokens what it answers has."""

    def step(self) -> str | None:
        """More text, or None where it has to be evaluated first. Raises `StopIteration` at the end."""


_Reply = TypeVar("_Reply", bound=Stepping)


def batches(lengths: Sequence[int], *, most_tokens: int, most: int, pads: bool) -> Iterator[list[int]]:
    """Places of texts of so many tokens, shortest first, in groups of up to `most` that fit into `most_tokens`.

    A text longer than that is alone. `pads`: each takes as much room as the longest of its group.
    """
    batch: list[int] = []
    used = 0
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        length = lengths[place]
        size = (len(batch) + 1) * length if pads else used + length
        if batch and (size > most_tokens or len(batch) == most):
            yield batch
            batch, used = [], 0
        batch.append(place)
        used += length
    if batch:
        yield batch


def run_in_batches(
    replies: Sequence[_Reply],
    *,
    alike: Callable[[_Reply], Hashable],
    limits: Callable[[list[_Reply]], tuple[int, int]],
    pads: bool,
    evaluate: Callable[[list[_Reply]], None],
) -> Iterator[tuple[int, str]]:
    """Run `replies` to their ends: (which one, text).

    Those share a batch that are `alike`; `limits` are the tokens of sources and the replies that it may have.
    """
    kinds: dict[Hashable, list[int]] = {}
    for number, one in enumerate(replies):
        if one.slot is not None:
            kinds.setdefault(alike(one), []).append(number)
    for numbers in kinds.values():
        most_tokens, most = limits([replies[number] for number in numbers])
        lengths = [replies[number].source_tokens for number in numbers]
        for places in batches(lengths, most_tokens=most_tokens, most=most, pads=pads):
            shared = [numbers[place] for place in places]
            for which, text in _advance([replies[number] for number in shared], evaluate):
                yield shared[which], text


def _advance(replies: Sequence[_Reply], evaluate: Callable[[list[_Reply]], None]) -> Iterator[tuple[int, str]]:
    """Run `replies` to their ends, all that wait evaluated at once: (which one, text)."""
    running = dict(enumerate(replies))
    while running:
        if waiting := [one for one in running.values() if one.is_waiting]:
            evaluate(waiting)
        said: list[tuple[int, str]] = []
        # All outputs are read before anybody who hears of one can have something else evaluated.
        for number, one in list(running.items()):
            try:
                while (text := one.step()) is not None:
                    said.append((number, text))
            except StopIteration:
                del running[number]
        yield from said
