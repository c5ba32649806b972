"""Bottleneck adapters of Houlsby et al. and Pfeiffer et al. as methods; what they compute is the torch engine's.

Beside the bottlenecks, Houlsby's method trains the layer norms; a task's head is trained in full with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.engine.torch.bottlenecks import add_bottlenecks, trained_parameters
from edgetune.errors import UnsupportedError
from edgetune.events import Notice, Sink
from edgetune.training.methods.base import Method, read_parameters, write_parameters
from edgetune.training.model import ADAPTER_CONFIG
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task


@dataclass(frozen=True)
class Bottleneck(Method):
    """Small layers between the base's own."""

    kind: str
    """`peft_type` of what is saved."""
    places: tuple[str, ...]
    layer_norms: bool

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """The model with adapters near the identity."""
        import torch

        if model_dir.is_file():
            raise UnsupportedError(
                f"{model_dir} is a GGUF file, and llama.cpp runs no such adapters.",
                hint="Give the directory it was made from with -m, or use --method lora.",
            )
        config = {
            "peft_type": self.kind,
            "task_type": task.peft_type,
            "base_model_name_or_path": str(model_dir.resolve()),
            "bottleneck": settings.bottleneck,
            "places": list(self.places),
            "layer_norms": self.layer_norms,
            "modules_to_save": task.head_modules(model),
        }
        torch.manual_seed(settings.seed)
        add_bottlenecks(model, config)
        for parameter in trained_parameters(model, config).values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        model.edgetune_bottlenecks = config
        sink(Notice("Such an adapter is run in torch: no GGUF file holds it."))
        return model

    def save(self, adapted: Any, directory: Path) -> None:
        """The adapter with its config."""
        write_parameters(self._parameters(adapted), directory)
        text = json.dumps(adapted.edgetune_bottlenecks, indent=2, sort_keys=True)
        (directory / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")

    def load(self, adapted: Any, directory: Path) -> None:
        """From `save`."""
        read_parameters(self._parameters(adapted), directory)

    def _parameters(self, adapted: Any) -> Mapping[str, Any]:
        return trained_parameters(adapted, adapted.edgetune_bottlenecks)


HOULSBY: Method = Bottleneck("HOULSBY", ("attention", "feed_forward"), layer_norms=True)
PFEIFFER: Method = Bottleneck("PFEIFFER", ("feed_forward",), layer_norms=False)
