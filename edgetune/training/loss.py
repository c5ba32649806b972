"""The loss: next-token cross entropy over learned positions, with logits computed only where one of them is.

At a vocabulary of 152 k the logits are the largest tensor of a step, and a prompt's are never used. Where the head is
one that `fused_loss` computes, no more than a chunk of them ever exists.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from edgetune.training.batches import IGNORED, Batch
from edgetune.training.fused_loss import find_head
from edgetune.training.packing import PackedBatch

if TYPE_CHECKING:
    import torch


def summed_loss(model: Any, batch: Batch | PackedBatch) -> torch.Tensor:
    """The sum of the cross entropy over `batch`'s learned positions, in f32; divide by their number for the mean."""
    inputs = forward_inputs(batch)
    head = find_head(model)
    if head is None:
        return _loss_of_logits(model, inputs, batch.labels)
    learned = (batch.labels != IGNORED).flatten().nonzero().squeeze(-1)
    hidden = head.body(**inputs).last_hidden_state.flatten(0, 1)  # (tokens, hidden)
    return head.summed_loss(hidden.index_select(0, learned), batch.labels.flatten()[learned])


def forward_inputs(batch: Batch | PackedBatch) -> dict[str, Any]:
    """What the model's forward takes of `batch`."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if isinstance(batch, PackedBatch):
        inputs["position_ids"] = batch.position_ids
    return inputs


def _loss_of_logits(model: Any, inputs: dict[str, Any], all_labels: torch.Tensor) -> torch.Tensor:
    import torch

    # Positions (columns) where any sequence of the batch learns; the model applies its head to these alone.
    columns = (all_labels != IGNORED).any(dim=0).nonzero().squeeze(-1)
    # PEFT's trained prompts stand in front; their positions have logits and no labels.
    shown = columns + prompt_length(model)
    limited = {"logits_to_keep": shown} if takes_logits_to_keep(model) else {}
    logits = model(**inputs, **limited).logits  # (sequences, columns, vocabulary)
    if not limited:
        logits = logits[:, shown]
    labels = all_labels[:, columns]
    learned = labels != IGNORED
    return torch.nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="sum")


def prompt_length(model: Any) -> int:
    """How many vectors of its own a prompt-tuned model puts in front of the text."""
    configs = getattr(model, "peft_config", {}).values()
    return sum(config.num_virtual_tokens for config in configs if config.is_prompt_learning)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model's forward can be told which positions' logits are wanted."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
