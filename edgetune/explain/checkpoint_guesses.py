"""What a transformers model would say if its blocks ended earlier, as guesses: one block after the other.

No more than one block's logits are held at a time, of the last positions alone where the model can be asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from edgetune.engine.protocol import LoraSpec
from edgetune.explain.checkpoint import Loaded
from edgetune.explain.checkpoint_states import BlockStates
from edgetune.explain.lens import divergence
from edgetune.explain.page import Guess, Lensed
from edgetune.explain.parts import most_guessed

if TYPE_CHECKING:
    import torch

_LARGEST_KL = 1e-3
"""Nats between what the model says and what it says with its blocks passed over, after the last of them."""
_TOP = 5


class Guesser:
    """Asks one model after every block; remembers the base's answers to compare with."""

    def __init__(self, loaded: Loaded, notes: list[str]) -> None:
        self._loaded, self._notes = loaded, notes
        self._base: list[torch.Tensor] = []
        """The base's logits after each block at the place that is told of, (1, vocabulary) each."""

    def __call__(
        self,
        blocks: BlockStates,
        given: dict[str, Any],
        logits: torch.Tensor,
        specs: Sequence[LoraSpec],
        *,
        place: int = -1,
    ) -> list[Lensed]:
        """What the head says after every block of the model, which at `place`, counted from the end, gave `logits`.

        `given` is what the model got, `logits` (vocabulary,). Empty, with a note, where it cannot be known.
        """
        embedded = blocks.embedded
        if embedded is None:
            return self._unknown()
        count = most_guessed(blocks.count, logits.shape[-1], embedded.shape[-1])
        known = {**given, **last_only(self._loaded.base, count)}
        lensed = []
        rows: list[torch.Tensor] = []
        for heard in blocks.heard(lambda: self._loaded.model(**known).logits[0].float()):
            row = heard[place, None].clone()
            base = self._base[len(rows)] if specs and self._base else None
            kl = float(divergence(base.numpy(), row.numpy())[0]) if base is not None else None
            rows.append(row)
            lensed.append(self._lensed(heard[-count:], row[0], kl))
        if divergence(logits[None].float().numpy(), rows[-1].numpy())[0] > _LARGEST_KL:
            return self._unknown()
        if not specs or not self._base:
            self._base = rows
        return lensed

    def _unknown(self) -> list[Lensed]:
        self._notes.append("Guesses inside the stack are not shown: where this model's blocks are is not known.")
        return []

    def _lensed(self, logits: torch.Tensor, row: torch.Tensor, kl: float | None) -> Lensed:
        """Of `logits` (tokens, vocabulary), and of the `row` that is told of."""
        pieces = self._loaded.pieces
        highest, best = logits.max(-1)
        shares = (highest - logits.logsumexp(-1)).exp()
        top, found = row.softmax(-1).topk(min(_TOP, len(row)))
        ids = found.tolist()
        guesses = map(Guess, ids, pieces(ids), top.tolist())
        return Lensed(tuple(guesses), tuple(pieces(best.tolist())), tuple(shares.tolist()), kl)


def last_only(base: Any, count: int) -> dict[str, int]:
    """What keeps a model from making logits of positions that nobody looks at, where it knows how to."""
    return {"logits_to_keep": count} if "logits_to_keep" in signature(base.forward).parameters else {}
