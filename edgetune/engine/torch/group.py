"""Texts that a model in torch goes through in one batch: sources padded on the right, targets token by token in step.

Keys and values of all of them are in one cache, a row each, several rows for the beams of one text. Chooses no tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.constraints import Constraints
from edgetune.engine.torch.adapters import AdapterSet

PADDED = (
    *("t5", "mt5", "umt5", "bart", "mbart", "plbart", "m2m_100", "marian", "pegasus", "blenderbot"),
    *("blenderbot-small", "encoder-decoder"),
)
"""`model_type` of those whose encoder, given a mask, makes of a padded text what it makes of the text alone."""


@dataclass(eq=False)
class Text:
    """One text, or several beams of it, in the engine."""

    source: list[int]
    """Of an encoder-decoder, what is encoded; of a decoder, nothing."""
    start: list[int]
    """What the decoder begins with: the start token, or the prompt."""
    adapters: AdapterSet
    constraints: Constraints
    max_new: int
    rows: int = 1
    """How many beams it has."""
    ids: list[int] = field(default_factory=list)
    """The decoder's tokens that were evaluated; of beams, only their number means anything."""
    group: Group | None = None
    """None before the first evaluation, and after the end."""


class Group:
    """Texts under the same adapters, all of them at the same token of their targets."""

    def __init__(self, model: Any, texts: Sequence[Text], *, pad_id: int) -> None:
        """`model` is transformers' own, or PEFT's; adapters are switched on by who evaluates."""
        self._model, self._pad_id = model, pad_id
        self._texts = list(texts)
        self._encoded: tuple[Any, Any] | None = None
        self._cache: Any = None
        for text in self._texts:
            text.group = self

    def forward(self, tokens: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Evaluate more tokens of every row; logits after each, (rows, tokens, vocabulary)."""
        import torch

        ids = torch.tensor([list(row) for row in tokens], device=self._model.device)
        with torch.inference_mode():
            if not self._texts[0].source:
                output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
            else:
                self._encoded = self._encoded or self._encode()
                encoded, mask = self._encoded
                output = self._model(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=ids,
                    past_key_values=self._cache,
                    use_cache=True,
                )
            logits: NDArray[np.float32] = output.logits.float().cpu().numpy()
        self._cache = output.past_key_values
        first = 0
        for text in self._texts:
            text.ids += tokens[first]
            first += text.rows
        return logits

    def narrowed(self, texts: Sequence[Text]) -> Group:
        """A group of `texts` alone, which are of this one; the group itself where the others have ended."""
        if list(texts) == self._texts:
            return self
        group = self
        if any(text.group is self for text in self._texts if text not in texts):
            group = copy.copy(self)
            group._cache = copy.deepcopy(self._cache)
        group._keep(texts)
        return group

    def reorder(self, parents: Sequence[int]) -> None:
        """Let row i go on as what was row `parents[i]`."""
        import torch

        self._cache.reorder_cache(torch.tensor(list(parents), device=self._model.device))

    def _keep(self, texts: Sequence[Text]) -> None:
        import torch

        first, rows = 0, list[int]()
        for text in self._texts:
            if text in texts:
                rows += range(first, first + text.rows)
                text.group = self
            first += text.rows
        self._texts = [text for text in self._texts if text in texts]
        kept = torch.tensor(rows, device=self._model.device)
        if self._encoded is not None:
            encoded, mask = self._encoded
            self._encoded = _with_states(encoded, encoded.last_hidden_state[kept]), mask[kept]
        if self._cache is not None:
            self._cache.batch_select_indices(kept)

    def _encode(self) -> tuple[Any, Any]:
        """The encoder's output for every row, and its mask."""
        import torch

        device = self._model.device
        width = max(len(text.source) for text in self._texts)
        ids = torch.full((len(self._texts), width), self._pad_id, device=device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(self._texts):
            ids[row, : len(text.source)] = torch.tensor(text.source, device=device)
            mask[row, : len(text.source)] = 1
        encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask)
        repeats = torch.tensor([text.rows for text in self._texts], device=device)
        states = encoded.last_hidden_state.repeat_interleave(repeats, dim=0)
        return _with_states(encoded, states), mask.repeat_interleave(repeats, dim=0)


def _with_states(encoded: Any, states: Any) -> Any:
    """An encoder's output, of whichever class its family has, with other hidden states."""
    changed = copy.copy(encoded)
    changed.last_hidden_state = states
    return changed
