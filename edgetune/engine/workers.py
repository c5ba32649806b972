"""Texts in batches, and several batches at once, each on cores of its own.

Cores that share one small batch wait for each other after every operation; a batch each keeps all of them at work, and
no core waits for a slower one. Evaluates nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from math import ceil
from typing import Protocol, TypeVar

from edgetune.engine.in_step import batches

_Result = TypeVar("_Result")

_LEAST_TOKENS = 128
"""Smaller batches multiply narrower matrices, which costs more than sharing them out saves."""
_ROUNDS = 4
"""Batches for each worker where there is enough to do, so that the last one of them is not waited for long."""
_LONG = 4
"""Batches of so many times the best number of tokens take much memory, and are enough for all cores."""


class Crew(Protocol):
    """What computes the batches."""

    @property
    def batch_tokens(self) -> int:
        """Tokens that are best computed at once."""

    @property
    def most_texts(self) -> int:
        """Texts that a batch may have."""

    @property
    def pads(self) -> bool:
        """Whether the texts of a batch are filled up to the longest one."""

    @property
    def workers(self) -> int:
        """How many batches are best computed at the same time, each from a thread of its own."""

    def share(self, workers: int) -> Callable[[], object]:
        """What a thread calls to have its share of this one's cores, as one of so many workers."""


def run(
    lengths: Sequence[int], compute: Callable[[list[int]], _Result], crew: Crew
) -> Iterator[tuple[list[int], _Result]]:
    """Places of texts of so many tokens, longest first, in batches, each with what `compute` makes of it.

    Raises what the first batch raises that fails; those not begun by then never are.
    """
    groups = _share_out(lengths, crew)
    alone = list(takewhile(lambda group: sum(lengths[at] for at in group) > _LONG * crew.batch_tokens, groups))
    for group in alone:
        yield group, compute(group)
    shared = groups[len(alone) :]
    workers = min(crew.workers, len(shared))
    if workers <= 1:
        yield from ((group, compute(group)) for group in shared)
        return
    with ThreadPoolExecutor(workers, initializer=crew.share(workers)) as pool:
        try:
            yield from zip(shared, pool.map(compute, shared), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            crew.share(1)()


def _share_out(lengths: Sequence[int], crew: Crew) -> list[list[int]]:
    most_tokens = crew.batch_tokens
    if crew.workers > 1:
        most_tokens = min(most_tokens, max(_LEAST_TOKENS, ceil(sum(lengths) / (crew.workers * _ROUNDS))))
    return list(batches(lengths, most_tokens=most_tokens, most=crew.most_texts, pads=crew.pads))[::-1]
