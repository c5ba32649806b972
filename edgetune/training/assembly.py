"""From a run's inputs to what computes its steps: the base with what is trained on it, the optimizer, the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgetune.events import Sink
from edgetune.training.compiled import compile_layers
from edgetune.training.device import choose_device, choose_dtype, random_state, restore_random_state
from edgetune.training.layout import Layout
from edgetune.training.layout_lean import Lean
from edgetune.training.methods import find_method
from edgetune.training.methods.base import Method
from edgetune.training.prepare import Plan, Prepared
from edgetune.training.settings import TrainSettings
from edgetune.training.speed import speed_up
from edgetune.training.split import split_layers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Assembled:
    """What takes steps, fresh."""

    method: Method
    adapted: Any
    """The model with its adapter."""
    optimizer: Any
    layout: Layout
    device: torch.device
    dtype: torch.dtype


def assemble(
    settings: TrainSettings, prepared: Prepared, planned: Plan, *, split: bool = False, sink: Sink
) -> Assembled:
    """Load the base and put on it what is trained; the same for the same seed. Raises what the method raises.

    `split`: this process keeps its share of the layers only.
    """
    import torch

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    method, task = find_method(settings.method), prepared.task
    torch.manual_seed(settings.seed)  # for heads that the base has no weights for
    place = torch.device("cpu") if split else device  # the whole of it may not fit where a share does
    model = method.load_base(prepared.model_dir, prepared.config, task, dtype=dtype, device=place)
    adapted = method.attach(model, settings, prepared.model_dir, task, sink=sink)
    if split:
        split_layers(adapted, device)
    layout = speed_up(
        adapted,
        settings,
        task,
        lengths=[len(sequence.ids) for sequence in (*prepared.train, *prepared.valid)],
        max_length=prepared.max_length,
        device=device,
        sink=sink,
    )
    if settings.torch_compile and not split:
        compile_layers(adapted, lambda: _try_step(adapted, prepared, layout, device, dtype), sink)
    possible = settings.grad_checkpointing == "auto"
    layout = Lean(layout, model, checkpointing=planned.grad_checkpointing, possible=possible)
    return Assembled(method, adapted, method.make_optimizer(adapted, settings, device), layout, device, dtype)


def _try_step(adapted: Any, prepared: Prepared, layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
    """A pass that leaves nothing behind."""
    import torch

    random = random_state(device)
    adapted.train()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss: Any = prepared.task.summed_loss(adapted, layout.batches([prepared.train[:1]])[0])
    loss.backward()
    adapted.zero_grad(set_to_none=True)
    restore_random_state(device, random)
