"""A smaller model that guesses what a larger one will say; see `speculation` for why that changes no reply."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.engine.sampling import Sampling
from edgetune.errors import MismatchError

if TYPE_CHECKING:
    from edgetune.engine.llama import LlamaEngine

_FOUNDED = 32
"""A model's guesses are all alike: as good as the longest text match, until their record says otherwise. With less it
would not be tried where a step over several tokens costs as much as on a CPU, and so never have a record."""
_GREEDY = Sampling(temp=0, ignore_eos=True)


class DraftModel:
    """See `speculation.Drafter`."""

    def __init__(self, engine: LlamaEngine, target: LlamaEngine) -> None:
        """Take over `engine`, which guesses for `target`. Raises `MismatchError` for another vocabulary."""
        mine, theirs = engine.tokenizer, target.tokenizer
        size = min(mine.n_vocab, theirs.n_vocab)
        # Padding at the end of a vocabulary may differ; no text uses it.
        if abs(mine.n_vocab - theirs.n_vocab) > 256 or mine.pieces(range(size)) != theirs.pieces(range(size)):
            raise MismatchError(
                f"The draft model {engine.path} has another vocabulary than {target.path}.",
                hint="Take a smaller model of the same family, or --draft ngram.",
            )
        self._engine, self._target, self._size = engine, target, size

    @property
    def cost(self) -> float:
        """What one guessed token costs, in steps of the target: measured, or by size before that."""
        mine, theirs = self._engine.costs.single, self._target.costs.single
        if mine and theirs:
            return mine / theirs
        return self._engine.memory.weights / max(1, self._target.memory.weights)

    def find(self, ids: Sequence[int]) -> int:
        """Always founded alike, as long as the text fits the draft model's context."""
        return _FOUNDED if len(ids) + 32 < self._engine.context_size else 0

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """What the draft model would say."""
        generation = self._engine.generate(ids, _GREEDY, max_tokens=count)
        for _ in generation:
            pass
        return [token for token in generation.ids if token < self._size]

    def close(self) -> None:
        """Free the draft model."""
        self._engine.close()


def open_draft(path: Path, target: LlamaEngine, *, threads: int, gpu_layers: int) -> DraftModel:
    """Load the model at `path` to guess for `target`."""
    engine = type(target).open(path, ctx_size=target.context_size, threads=threads, gpu_layers=gpu_layers)
    try:
        return DraftModel(engine, target)
    except BaseException:
        engine.close()
        raise
