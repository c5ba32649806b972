"""Sequences one after another in rows without padding; attention never crosses from one to the next.

A step's sequences are laid into rows of at most `max_length` tokens (best fit), positions restart with each, and
attention (`packed_attention`) runs on each by itself: no block-diagonal mask, which would cost what padding had cost.
The lengths travel as the model's "attention mask", a (1, 1, 1, sequences) tensor that transformers hands to every layer
as it is, through gradient checkpointing as well. Which sequences make up a step does not change: nor does its loss, but
for rounding.

Families are not listed here: `start_packing` packs a few tokens and compares with each sequence by itself. A model that
carries something else from token to token than attention (Mamba) fails that and is trained padded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.data import Tokenized
from edgetune.training.batches import IGNORED
from edgetune.training.packed_attention import packed_attention
from edgetune.training.packed_kernels import Kernel, kernels_for, learns

if TYPE_CHECKING:
    import torch

ROW_STEP = 64
"""Rows are filled up to a multiple of this, with a sequence nothing is learned of.

oneDNN compiles and keeps kernels for every shape it meets: with all shapes there are, that is a quarter of the time
and hundreds of megabytes.
"""

_TOLERANCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.1, "torch.float16": 0.02}
"""Of the hidden states' norm. Rounding stays far below it, a token seen that should not be far above."""


@dataclass(frozen=True)
class PackedBatch:
    """One row of sequences, ready for a causal language model."""

    input_ids: torch.Tensor
    """(1, tokens)"""
    position_ids: torch.Tensor
    """(1, tokens)"""
    attention_mask: torch.Tensor
    """(1, 1, 1, sequences): their lengths, on the CPU; the last ones may be filling."""
    labels: torch.Tensor
    """(1, tokens): the token to predict at each position, or `IGNORED`."""
    tokens: int
    """Without the filling."""
    learned_tokens: int

    @property
    def denominator(self) -> float:
        """The loss is a mean over learned tokens."""
        return float(self.learned_tokens)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `capacity`, the longest first, each where the least room is left.

    A length above `capacity` has a row of its own. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([])
            left, row = max(capacity, lengths[index]), len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def pack(sequences: Sequence[Tokenized], capacity: int, device: torch.device) -> list[PackedBatch]:
    """`sequences` in as few rows of `capacity` tokens as best fit finds, as tensors on `device`."""
    rows = best_fit([len(sequence.ids) for sequence in sequences], capacity)
    return [collate_packed([sequences[index] for index in row], device) for row in rows]


def collate_packed(sequences: Sequence[Tokenized], device: torch.device) -> PackedBatch:
    """`sequences` in one row."""
    import torch

    lengths = [len(sequence.ids) for sequence in sequences]
    tokens = sum(lengths)
    # In stretches no longer than the sequences: a model may have no positions for more.
    filling, longest = -tokens % ROW_STEP, max(lengths)
    lengths += [min(longest, filling - at) for at in range(0, filling, longest)]
    ids = np.zeros(tokens + filling, dtype=np.int64)
    labels = np.full(tokens + filling, IGNORED, dtype=np.int64)
    at = 0
    for sequence in sequences:
        end = at + len(sequence.ids)
        ids[at:end] = sequence.ids
        labels[at : end - 1] = np.where(sequence.learned[1:], sequence.ids[1:], IGNORED)
        at = end
    return PackedBatch(
        torch.from_numpy(ids[None]).to(device),
        _positions(lengths)[None].to(device),
        _lengths(lengths),
        torch.from_numpy(labels[None]).to(device),
        tokens,
        int((labels != IGNORED).sum()),
    )


def _positions(lengths: Sequence[int]) -> torch.Tensor:
    """(tokens,): from 0 again with every sequence."""
    import torch

    return torch.cat([torch.arange(length) for length in lengths])


def _lengths(lengths: Sequence[int]) -> torch.Tensor:
    """(1, 1, 1, sequences): what stands in for the attention mask."""
    import torch

    return torch.tensor(lengths, dtype=torch.int64).view(1, 1, 1, -1)


def start_packing(model: Any, body: Any, *, longest: int) -> bool:
    """Let `model` (a transformers model) attend within packed sequences of up to `longest` tokens, if it is exact.

    `body` is its part that gives last hidden states. A model that cannot is left as it was.
    """
    before = model.config._attn_implementation
    ids = _probe(model, longest)
    alone = _hidden(body, input_ids=ids[None, _PROBE_FIRST:])
    if alone is None or not model._can_set_attn_implementation():
        return False
    lengths = [_PROBE_FIRST, len(ids) - _PROBE_FIRST]
    for kernel in kernels_for(model.device, model.dtype):
        if not learns(kernel, model) or not _set_attention(model, kernel):
            continue
        packed = _hidden(
            body,
            input_ids=ids[None],
            position_ids=_positions(lengths).to(ids.device)[None],
            attention_mask=_lengths(lengths),
        )
        if packed is not None:
            error = (packed[_PROBE_FIRST:] - alone).norm()
            if bool(error <= _TOLERANCE[str(model.dtype)] * alone.norm()):
                return True
    _set_implementation(model, before)
    return False


_PROBE_FIRST = 9
"""Tokens of the sequence that comes before the one compared."""


def _probe(model: Any, longest: int) -> torch.Tensor:
    """Two sequences of tokens all over the vocabulary; the second longer than the model's window, if that matters."""
    import torch

    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or longest
    second = window + 5 if window < longest else 11
    ids: torch.Tensor = torch.arange(_PROBE_FIRST + second, device=model.device) * 7919
    return torch.add((ids + 1) % (config.vocab_size - 1), 1)


def _hidden(body: Any, **inputs: Any) -> torch.Tensor | None:
    """Last hidden states (tokens, hidden) in f32; None where the model takes no such inputs."""
    import torch

    training = body.training
    body.eval()
    try:
        with torch.no_grad():
            hidden: torch.Tensor = body(**inputs, use_cache=False).last_hidden_state[0]
        return hidden.float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return None
    finally:
        body.train(training)


def _set_attention(model: Any, kernel: Kernel) -> bool:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(kernel.name, partial(packed_attention, kernel=kernel))
    AttentionMaskInterface.register(kernel.name, sdpa_mask)
    return _set_implementation(model, kernel.name)


def _set_implementation(model: Any, name: str) -> bool:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    return bool(model.config._attn_implementation == name)
