"""Which sequences come together, in which order, as which tensors.

The order of an epoch is a pure function of (seed, epoch), so that a resumed run needs no more than its step.
Sequences of similar length come together, to pad little. Packing several sequences into one row would be another
collator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Tokenized

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Label of a position whose token is not learned, as torch's cross entropy takes it."""

_BATCHES_SORTED_TOGETHER = 32

_LENGTH_STEP = 16
"""Batches are padded to a multiple of this: oneDNN keeps kernels for every shape it meets, in bf16 up to gigabytes."""


@dataclass(frozen=True)
class Batch:
    """Padded sequences, ready for a causal language model."""

    input_ids: torch.Tensor
    """(sequences, tokens)"""
    attention_mask: torch.Tensor | None
    """(sequences, tokens), 1 where a token is; None when nothing is padded."""
    labels: torch.Tensor
    """(sequences, tokens): the token to predict *at* each position, i.e. the next one, or `IGNORED`."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        mask = self.attention_mask
        return int(mask.sum()) if mask is not None else self.input_ids.numel()

    @property
    def learned_tokens(self) -> int:
        """Positions the loss is over."""
        return int((self.labels != IGNORED).sum())

    @property
    def denominator(self) -> float:
        """The mean is over the learned tokens."""
        return self.learned_tokens


def epoch_batches(
    lengths: Sequence[int], *, batch_size: int, seed: int, epoch: int, chosen: NDArray[np.int64] | None = None
) -> list[list[int]]:
    """Indices of every sequence once, or `chosen` ones, in shuffled batches of `batch_size` or fewer."""
    random = np.random.default_rng([seed, epoch])
    chosen = np.arange(len(lengths)) if chosen is None else chosen
    order = chosen[random.permutation(len(chosen))]
    stretch = batch_size * _BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for at in range(0, len(order), stretch):
        # A stable sort keeps the shuffle among equal lengths.
        near = sorted(order[at : at + stretch].tolist(), key=lambda index: lengths[index])
        batches += [near[begin : begin + batch_size] for begin in range(0, len(near), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def padded_length(longest: int, most: int | None) -> int:
    """What `longest` is padded to: rounded up, but to no more than `most`, which a model may have no positions for."""
    rounded = longest + -longest % _LENGTH_STEP
    return max(longest, min(rounded, most or rounded))


def collate(sequences: Sequence[Tokenized], device: torch.device, *, most: int | None = None) -> Batch:
    """Pad `sequences` on the right to one length, that of the longest rounded up where `most` allows it."""
    import torch

    longest = padded_length(max(len(sequence.ids) for sequence in sequences), most)
    ids = np.zeros((len(sequences), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORED)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[row, :length] = sequence.ids
        mask[row, :length] = 1
        labels[row, : length - 1] = np.where(sequence.learned[1:], sequence.ids[1:], IGNORED)
    attention_mask = None if mask.all() else torch.from_numpy(mask).to(device)
    return Batch(torch.from_numpy(ids).to(device), attention_mask, torch.from_numpy(labels).to(device))
