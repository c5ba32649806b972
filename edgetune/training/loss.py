"""The loss: next-token cross entropy over learned positions, with logits computed only where one of them is.

At a vocabulary of 152 k the logits are the largest tensor of a step, and a prompt's are never used. A fused loss
would be another function with the same signature.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from edgetune.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The sum of the cross entropy over `batch`'s learned positions, in f32; divide by their number for the mean."""
    import torch

    # Positions (columns) where any sequence of the batch learns; the model applies its head to these alone.
    columns = (batch.labels != IGNORED).any(dim=0).nonzero().squeeze(-1)
    limited = {"logits_to_keep": columns} if takes_logits_to_keep(model) else {}
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **limited
    ).logits  # (sequences, columns, vocabulary)
    if not limited:
        logits = logits[:, columns]
    labels = batch.labels[:, columns]
    learned = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can be told which positions' logits are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
