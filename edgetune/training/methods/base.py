"""What a method answers: how the base is loaded, what is put on it to train, and how that is written and read again.

What a method trains is every parameter of the model that requires a gradient. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgetune.events import Sink

if TYPE_CHECKING:
    import torch

    from edgetune.training.settings import TrainSettings
    from edgetune.training.tasks.base import Task


class Method(Protocol):
    """One way to adapt a base."""

    def load_base(self, model_dir: Path, config: Any, task: Task, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The base with the task's head, frozen. Raises `CorruptFileError`."""
        ...

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """`model` with what is trained on it, fresh. Also called without weights, for the plan. Raises `UsageError`."""
        ...

    def save(self, adapted: Any, directory: Path) -> None:
        """Write what is trained into `directory`: adapter_config.json and adapter_model.safetensors."""
        ...

    def load(self, adapted: Any, directory: Path) -> None:
        """Put back what `save` wrote. Raises `CorruptFileError` when it is another adapter's."""
        ...
