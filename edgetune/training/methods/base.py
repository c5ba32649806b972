"""What a method answers: how the base is loaded, what is put on it to train, and how that is written and read again.

What a method trains is every parameter of the model that requires a gradient. A method of another package derives from
`Method` and answers what it does in its own way. Nothing here imports torch at import time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgetune.errors import CorruptFileError
from edgetune.events import Sink
from edgetune.training.model import ADAPTER_WEIGHTS, load_adapter, load_base, save_adapter, write_tensors

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings
    from edgetune.training.tasks.base import Task


class Method:
    """One way to adapt a base; by default a frozen base, AdamW, and a PEFT adapter that `attach` makes."""

    options: ClassVar[Mapping[str, str]] = {}
    """What `settings.option` may hold for it: name → what it is."""

    fuses: ClassVar[bool] = True
    """Whether its LoRA layers, where it has any, stand on weights that `fused_lora` computes with."""

    def load_base(self, model_dir: Path, config: Any, task: Task, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The base with the task's head, frozen. Raises `CorruptFileError`."""
        return load_base(model_dir, config, task=task, dtype=dtype, device=device)

    def load_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the base's weights are kept in when `dtype` is computed in."""
        return dtype

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """`model` with what is trained on it, fresh. Also called without weights, for the plan.

        Raises `UsageError` and `UnsupportedError` for settings, bases and tasks that this method is not for.
        """
        raise NotImplementedError

    def make_optimizer(self, adapted: Any, settings: TrainSettings, device: torch.device) -> Any:
        """The optimizer. A group's "ratio" is what the run's learning rate is multiplied with."""
        import torch

        fused = device.type in ("cpu", "cuda")
        groups = self.parameter_groups(adapted, settings)
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)

    def parameter_groups(self, adapted: Any, settings: TrainSettings) -> list[dict[str, Any]]:
        """What is trained, in the optimizer's groups."""
        return [{"params": list(trained(adapted).values())}]

    def save(self, adapted: Any, directory: Path) -> None:
        """Write what is trained into `directory`, for a checkpoint: adapter_model.safetensors, and what explains it."""
        save_adapter(adapted, directory)

    def load(self, adapted: Any, directory: Path) -> None:
        """Put back what `save` wrote. Raises `CorruptFileError` when it is another adapter's."""
        load_adapter(adapted, directory)

    def publish(self, adapted: Any, directory: Path, model_dir: Path) -> None:
        """Write what the finished run leaves. The last call: `adapted` may be changed."""
        self.save(adapted, directory)

    def frozen_bytes(self, adapted: Any, dtype: torch.dtype) -> int:
        """What the weights that are not trained take in memory; `adapted` may be without its numbers."""
        return sum(p.numel() * dtype.itemsize for p in adapted.parameters() if not p.requires_grad)


def trained(adapted: Any) -> dict[str, Any]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def write_parameters(parameters: Mapping[str, Any], directory: Path) -> None:
    """Write `parameters` as they are."""
    write_tensors(parameters, directory / ADAPTER_WEIGHTS)


def read_parameters(parameters: Mapping[str, Any], directory: Path) -> None:
    """Put back what `write_parameters` wrote. Raises `CorruptFileError` when these are others."""
    import safetensors.torch

    tensors = safetensors.torch.load_file(directory / ADAPTER_WEIGHTS)
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise CorruptFileError(f"{directory / ADAPTER_WEIGHTS} does not hold this run's tensors.")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
