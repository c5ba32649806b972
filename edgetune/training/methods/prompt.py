"""Prompt tuning (arXiv:2104.08691), as PEFT has it: vectors in front of the text are trained, the model stays as it is.

For models that write text. No GGUF file holds such vectors, and PEFT alone runs them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from edgetune.errors import UnsupportedError
from edgetune.events import Notice, Sink
from edgetune.training.methods.base import Method
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task


class Prompt(Method):
    """Trained vectors that stand in front of every text."""

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """The model with vectors that start as those of tokens drawn from its vocabulary."""
        import peft
        import torch

        if task.peft_type != "CAUSAL_LM" or model_dir.is_file():
            what = f"{model_dir} is a GGUF file" if model_dir.is_file() else f"{task.name} is another task"
            raise UnsupportedError(
                f"--method prompt is for decoders in a Hugging Face directory that write text; {what}.",
                hint="Use --method lora.",
            )
        torch.manual_seed(settings.seed)
        config = peft.PromptTuningConfig(task_type=task.peft_type, num_virtual_tokens=settings.prompt_tokens)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config)
        vectors = adapted.prompt_encoder["default"].embedding.weight
        rows = model.get_input_embeddings().weight
        chosen = torch.randperm(len(rows), device="cpu")[: settings.prompt_tokens]
        if vectors.device.type != "meta":
            vectors.data = rows[chosen.to(rows.device)].detach().float().clone()
        adapted.peft_config["default"].base_model_name_or_path = str(model_dir.resolve())
        sink(Notice("A trained prompt is run by PEFT alone: no GGUF file holds it."))
        return adapted


PROMPT: Method = Prompt()
