"""LoRA, as PEFT has it: the base frozen in bf16 or f32, the adapter in f32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.events import Sink
from edgetune.training.methods.base import Method
from edgetune.training.model import add_adapter, load_adapter, load_base, save_adapter
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task

if TYPE_CHECKING:
    import torch


class Lora:
    """Low-rank adapters on the chosen modules."""

    def load_base(self, model_dir: Path, config: Any, task: Task, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The base as it is."""
        return load_base(model_dir, config, task=task, dtype=dtype, device=device)

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """A fresh adapter, which changes nothing yet."""
        return add_adapter(model, settings, model_dir, task=task, sink=sink)

    def save(self, adapted: Any, directory: Path) -> None:
        """A PEFT directory."""
        save_adapter(adapted, directory)

    def load(self, adapted: Any, directory: Path) -> None:
        """From a PEFT directory."""
        load_adapter(adapted, directory)


LORA: Method = Lora()
"""The method, which keeps no state."""
