"""What makes a step fast and lean without changing what it computes: fused LoRA, fused head and loss, packed rows.

Each is exact but for rounding, or is left out for this model, and what is left out is said once. Knows nothing of the
loop: it is handed a model with its adapter and gives back the layout of its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgetune.events import Notice, Sink
from edgetune.training.fused_lora import fuse_lora
from edgetune.training.fused_loss import find_head
from edgetune.training.layout import Layout, Packed, Padded
from edgetune.training.packing import start_packing
from edgetune.training.tasks.base import Task

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings


def speed_up(
    adapted: Any,
    settings: TrainSettings,
    task: Task,
    *,
    lengths: Sequence[int],
    max_length: int,
    device: torch.device,
    sink: Sink,
) -> Layout:
    """Make `adapted` fast and choose the layout. `lengths` are those of all sequences, in tokens.

    Only a task that says `packs = True` (next-token prediction, its sequences `Tokenized`) is packed; one that says
    `packs_batches = True` lays out its own batches, as packed rows once it is told so by `packed = True`.
    """
    fuse_lora(adapted)
    padded = Padded(task, device, settings.batch_size)
    packs_batches = getattr(task, "packs_batches", False)
    if not (settings.packing and (packs_batches or getattr(task, "packs", False))):
        return padded
    longest = max(lengths)
    head = find_head(adapted)
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    if head is None or not start_packing(base, head.body, longest=longest):
        sink(Notice("Sequences are padded, not packed: this model does not keep packed ones apart."))
        return padded
    if packs_batches:
        task.packed = True  # type: ignore[attr-defined]
        return padded
    return Packed(row_capacity(settings.batch_size, longest=longest, max_length=max_length), longest, device)


def row_capacity(batch_size: int, *, longest: int, max_length: int) -> int:
    """Tokens in a packed row: no more than a padded batch could have, and than the model's usual length."""
    return max(longest, min(max_length, batch_size * longest))
