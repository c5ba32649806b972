"""A transformers encoder or classifier at work: batches of token ids → pooled states or logits, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from edgetune.engine.encoder import Profile
from edgetune.engine.encoder_tokens import Encoded
from edgetune.engine.torch.sentence_layers import pool
from edgetune.head import Array, Pooling

_BATCH_TOKENS = 4096
_BATCH_BYTES_CORE = 2048
"""Of one value of each token: a CPU's core is faster with states that stay in its cache."""


class TorchBackend:
    """A transformers model; see `encoder.Backend`."""

    pads = True
    most_texts = _BATCH_TOKENS

    def __init__(self, model: Any, profile: Profile, *, modes: Sequence[str], pad_id: int) -> None:
        """Take over `model`, a classifier where `profile` scores texts."""
        self._model, self._modes, self._pad_id = model, tuple(modes), pad_id
        scores = profile.head is not None and profile.head.scores_texts
        inner = self.transformers_model
        self._encoder = inner.base_model if scores else inner
        # transformers finds a text's last token by the padding's id, which a text may end with.
        self._last_token_head = getattr(inner, "score", None) if scores and not profile.is_encoder else None
        self._takes_types = getattr(inner.config, "type_vocab_size", 0) > 1
        self._device = next(model.parameters()).device
        self.profile = profile
        """What the model is for."""

    @property
    def workers(self) -> int:
        """How many batches are best computed at once; some decoders keep state between the layers of one."""
        import torch

        return torch.get_num_threads() if self._device.type == "cpu" and self.profile.is_encoder else 1

    @property
    def batch_tokens(self) -> int:
        """Tokens that are best computed at once."""
        import torch

        if self._device.type != "cpu":
            return _BATCH_TOKENS
        of_a_core: int = _BATCH_BYTES_CORE // next(self._model.parameters()).element_size()
        return min(_BATCH_TOKENS, of_a_core * torch.get_num_threads() // self.workers)

    @property
    def model(self) -> Any:
        """The transformers model, with PEFT's around it where there is an adapter."""
        return self._model

    @property
    def transformers_model(self) -> Any:
        """The transformers model itself."""
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model

    def pool(self, batch: Sequence[Encoded], pooling: Pooling | None = None) -> Array:
        """Pooled last hidden states, (n, hidden); with several poolings end to end where the model asks for it."""
        import torch

        with torch.inference_mode():
            inputs = self.inputs(batch)
            states = self._encoder(**inputs).last_hidden_state
            lengths = torch.tensor([len(one) for one in batch], device=self._device)
            parts = [pool(states, lengths, mode) for mode in ((pooling,) if pooling else self._modes)]
            return np.asarray(torch.cat(parts, dim=-1).float().cpu().numpy(), np.float32)

    def score(self, batch: Sequence[Encoded]) -> Array:
        """The classifier's logits, (n, outputs)."""
        import torch

        with torch.inference_mode():
            if self._last_token_head is not None:
                states = self._encoder(**self.inputs(batch)).last_hidden_state
                lengths = torch.tensor([len(one) for one in batch], device=self._device)
                logits = self._last_token_head(pool(states, lengths, "last"))
                return np.asarray(logits.float().cpu().numpy(), np.float32)
            return np.asarray(self._model(**self.inputs(batch)).logits.float().cpu().numpy(), np.float32)

    def share(self, workers: int) -> Callable[[], object]:
        """What a thread calls to have its share of this one's cores, as one of so many workers."""
        import torch

        # A thread keeps its own number; new ones begin with the last that was set, wherever.
        return partial(torch.set_num_threads, max(1, torch.get_num_threads() // workers))

    def close(self) -> None:
        """Let go of the model."""
        self._model = self._encoder = None

    def inputs(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        """What the transformers model takes of them, filled up on the right: ids, mask and types, (n, width)."""
        import torch

        width = max(map(len, batch))
        ids, types, mask = (np.zeros((len(batch), width), np.int64) for _ in range(3))
        ids[:] = self._pad_id
        for row, one in enumerate(batch):
            ids[row, : len(one)], mask[row, : len(one)] = one.ids, 1
            if one.types:
                types[row, : len(one)] = one.types
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = types
        return {name: torch.from_numpy(values).to(self._device) for name, values in inputs.items()}
