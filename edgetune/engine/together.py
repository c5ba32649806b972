"""Several replies side by side on one context: in one batch, or taking turns, whichever is faster here.

Replies under different adapters must take turns: llama.cpp applies adapters to a whole evaluation. Under the same ones
a batch of two costs more than two steps on some machines (2.4 steps on two CPU cores), hardly more than one on others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetune.engine.generation import LlamaGeneration
    from edgetune.engine.llama import LlamaEngine

_TRIALS = 3
"""How often a batch is tried on a GPU before its cost is believed; the first one sets up its graph."""
_TURN_SECONDS, _LONGEST_TURN = 0.12, 16
"""How long a reply advances before one under other adapters does, and in tokens: each change costs some milliseconds,
since llama.cpp builds its graph anew."""


def run_together(engine: LlamaEngine, generations: Sequence[LlamaGeneration]) -> Iterator[tuple[int, str]]:
    """Advance `generations` until all have ended: (which one, text)."""
    running = dict(enumerate(generations))
    trials = 0
    while running:
        shared = _alike(running)
        wanted = [len(running[number].pending) for number in shared]
        if len(shared) > 1 and _pays(engine, wanted, is_trial=trials < _TRIALS):
            trials += 1
            engine.evaluate([running[number] for number in shared])
        else:
            shared = []
        turn = _turn(engine) if len({one.adapters for one in running.values()}) > 1 else 1
        # The batch's outputs are read before anything else is evaluated.
        for number in (*shared, *(other for other in list(running) if other not in shared)):
            one = running[number]
            try:
                for _ in range(1 if number in shared else turn):
                    if one.is_waiting and number not in shared:
                        engine.evaluate([one])
                    while (text := one.step()) is not None:
                        yield number, text
            except StopIteration:
                del running[number]


def _alike(running: dict[int, LlamaGeneration]) -> list[int]:
    """Replies that have begun and run under the same adapters as the first of them."""
    begun = {number: one for number, one in running.items() if one.slot is not None}
    first = next(iter(begun.values()), None)
    return [number for number, one in begun.items() if first and one.adapters == first.adapters]


def _turn(engine: LlamaEngine) -> int:
    """Tokens in one turn."""
    single = engine.costs.single
    return max(1, min(_LONGEST_TURN, int(_TURN_SECONDS / single))) if single else 1


def _pays(engine: LlamaEngine, tokens: Sequence[int], *, is_trial: bool) -> bool:
    if is_trial and engine.is_on_gpu:
        return True
    return engine.costs.ratio(sum(tokens)) < sum(engine.costs.ratio(count) for count in tokens)
