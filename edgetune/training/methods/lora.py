"""LoRA, as PEFT has it, and what differs from it in one field: the base frozen in bf16 or f32, the adapter in f32.

rsLoRA scales by alpha / sqrt(rank) (arXiv:2312.03732), DoRA trains magnitudes beside directions (arXiv:2402.09353),
LoRA+ trains B faster than A (arXiv:2402.12354).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.events import Sink
from edgetune.training.methods.base import Method, trained
from edgetune.training.model import add_adapter
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank adapters on the chosen modules."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of PEFT's LoraConfig that this method sets."""

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """A fresh adapter, which changes nothing yet."""
        return add_adapter(model, settings, model_dir, task=task, sink=sink, fields=self.fields)


class LoraPlus(Lora):
    """LoRA whose B learns at a multiple of A's learning rate."""

    def parameter_groups(self, adapted: Any, settings: TrainSettings) -> list[dict[str, Any]]:
        """B apart from everything else."""
        second = {name: p for name, p in trained(adapted).items() if ".lora_B." in name or ".lora_embedding_B." in name}
        first = [parameter for name, parameter in trained(adapted).items() if name not in second]
        return [{"params": first}, {"params": list(second.values()), "ratio": settings.lora_plus_ratio}]


LORA: Method = Lora()
RSLORA: Method = Lora({"use_rslora": True})
DORA: Method = Lora({"use_dora": True})
LORA_PLUS: Method = LoraPlus()
