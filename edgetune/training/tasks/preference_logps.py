"""Log-probabilities of whole replies under the model, with the logits of no more than a few hundred tokens at a time.

The gradient of such a loss is known only when every reply of a batch has been read, so the logits of each chunk are
computed again in the backward pass instead of being kept. The same pass without gradients, with the adapter switched
off, gives the base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.data import Tokenized
from edgetune.errors import UnsupportedError
from edgetune.training.batches import IGNORED, Batch, collate
from edgetune.training.fused_loss import CHUNK, FusedHead, find_head
from edgetune.training.loss import forward_inputs, prompt_length, takes_logits_to_keep
from edgetune.training.packing import PackedBatch, collate_packed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Replies:
    """Prompts with replies, and which learned token is whose."""

    rows: Batch | PackedBatch
    owners: torch.Tensor
    """(learned tokens,): the number of the sequence."""
    counts: torch.Tensor
    """(sequences,): learned tokens of each."""

    @classmethod
    def of(
        cls, sequences: Sequence[Tokenized], device: torch.device, *, packed: bool, most: int | None = None
    ) -> Replies:
        """`sequences` as rows padded to no more than `most` tokens, or in one packed row."""
        import torch

        rows: Batch | PackedBatch
        rows = collate_packed(sequences, device) if packed else collate(sequences, device, most=most)
        counts = np.array([int(sequence.learned[1:].sum()) for sequence in sequences])
        owners = np.repeat(np.arange(len(sequences)), counts)
        return cls(rows, torch.from_numpy(owners).to(device), torch.from_numpy(counts).to(device))


@dataclass(frozen=True)
class Scores:
    """What the model thinks of each reply; (sequences,) in f32."""

    sums: torch.Tensor
    """log p of the reply."""
    means: torch.Tensor
    """The same per token."""

    def split(self, at: int) -> tuple[Scores, Scores]:
        """The first `at` replies, and the others."""
        return Scores(self.sums[:at], self.means[:at]), Scores(self.sums[at:], self.means[at:])


def score(model: Any, replies: Replies) -> Scores:
    """The log-probabilities of `replies` under `model`."""
    import torch

    tokens = token_log_probabilities(model, replies.rows)
    sums = torch.zeros(len(replies.counts), dtype=tokens.dtype, device=tokens.device)
    sums = sums.index_add(0, replies.owners, tokens)
    return Scores(sums, sums / replies.counts)


def score_base(adapted: Any, replies: Replies) -> Scores:
    """The log-probabilities of `replies` under the base: `adapted` with its adapter off, no dropout, no gradient."""
    import torch

    with torch.no_grad(), adapter_off(adapted) as base:
        return score(base, replies)


@contextmanager
def adapter_off(adapted: Any) -> Iterator[Any]:
    """The model as if nothing had been put on it. Raises `UnsupportedError` where that cannot be had."""
    if not hasattr(adapted, "disable_adapter"):
        raise UnsupportedError(
            "What is trained here cannot be switched off to compare with the base.",
            hint="Use --method lora, or --task orpo or simpo, which compare with no base.",
        )
    training = adapted.training
    adapted.eval()
    try:
        if prompt_length(adapted):
            yield adapted.get_base_model()
        else:
            with adapted.disable_adapter():
                yield adapted
    finally:
        adapted.train(training)


def token_log_probabilities(model: Any, rows: Batch | PackedBatch) -> torch.Tensor:
    """log p of every learned token of `rows`, in their order, (learned tokens,) in f32."""
    labels = rows.labels.flatten()
    learned = (labels != IGNORED).nonzero().squeeze(-1)
    head = find_head(model)
    if head is None:
        return _of_logits(model, rows)
    hidden = head.body(**forward_inputs(rows)).last_hidden_state.flatten(0, 1)  # (tokens, hidden)
    return _in_chunks(head, hidden.index_select(0, learned), labels[learned])


def _in_chunks(head: FusedHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch
    from torch.utils.checkpoint import checkpoint

    def chunk(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head.module(part).float() * head.scale
        if head.cap:
            logits = torch.tanh(logits / head.cap) * head.cap
        return _selected(logits, wanted)

    found = []
    for part, wanted in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(chunk, part, wanted, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(chunk(part, wanted))
    return torch.cat(found)


def _selected(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """log softmax of `logits` (tokens, vocabulary) at `wanted` (tokens,)."""
    chosen: torch.Tensor = logits.gather(-1, wanted[:, None]).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def _of_logits(model: Any, rows: Batch | PackedBatch) -> torch.Tensor:
    """From the model's own logits, at the positions where any row learns."""
    learned = rows.labels != IGNORED
    columns = learned.any(dim=0).nonzero().squeeze(-1)
    shown = columns + prompt_length(model)
    limited = {"logits_to_keep": shown} if takes_logits_to_keep(model) else {}
    logits = model(**forward_inputs(rows), **limited).logits  # (sequences, columns, vocabulary)
    if not limited:
        logits = logits[:, shown]
    kept = learned[:, columns]
    return _selected(logits[kept].float(), rows.labels[:, columns][kept])
