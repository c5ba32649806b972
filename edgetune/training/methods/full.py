"""Every weight of the model trained, in f32 (computed in bf16 where the run is); the run is a whole checkpoint.

What is left is a Hugging Face directory in the base's own type, tied weights tied, that `edgetune convert` takes as any
other. There is no adapter.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifacts import trained_pooling
from edgetune.errors import UnsupportedError
from edgetune.events import Sink
from edgetune.fingerprint import module_dirs, read_safetensors_header, safetensors_files
from edgetune.sentence_modules import write_pooling
from edgetune.training.methods.base import Method, read_parameters, trained, write_parameters
from edgetune.training.model import load_base
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks.base import Task

if TYPE_CHECKING:
    import torch

_STORED = {"BF16": "bfloat16", "F16": "float16"}


class Full(Method):
    """Nothing is frozen but what the task does not run."""

    def load_base(self, model_dir: Path, config: Any, task: Task, *, dtype: torch.dtype, device: torch.device) -> Any:
        """The base in f32: steps smaller than a bf16 number's last digit must not be lost."""
        return load_base(model_dir, config, task=task, dtype=self.load_dtype(dtype), device=device)

    def load_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """f32, whatever is computed in."""
        import torch

        return torch.float32

    def attach(self, model: Any, settings: TrainSettings, model_dir: Path, task: Task, *, sink: Sink) -> Any:
        """The model itself."""
        if model_dir.is_file():
            raise UnsupportedError(
                f"{model_dir} keeps its weights in blocks, which are not trained.",
                hint="Give the directory it was made from with -m, or train an adapter: --method lora.",
            )
        model.requires_grad_(True)
        heads = task.head_modules(model)
        for name in task.frozen_modules(model):
            if name not in heads:
                model.get_submodule(name).requires_grad_(False)
        return model

    def save(self, adapted: Any, directory: Path) -> None:
        """The weights in f32, to go on with."""
        write_parameters(trained(adapted), directory)

    def load(self, adapted: Any, directory: Path) -> None:
        """From `save`."""
        read_parameters(trained(adapted), directory)

    def publish(self, adapted: Any, directory: Path, model_dir: Path) -> None:
        """A checkpoint in the type of the base's, with what says how a sentence-transformers model pools."""
        import torch

        adapted.to(getattr(torch, _STORED.get(_stored_type(model_dir), "float32")))
        adapted.save_pretrained(directory)
        _copy_modules(model_dir, directory)
        if pooling := trained_pooling(directory.parent):
            write_pooling(directory, pooling, adapted.config.get_text_config().hidden_size)


def _copy_modules(model_dir: Path, directory: Path) -> None:
    """Copy what a sentence-transformers directory has beside its model."""
    for path in model_dir.glob("*.json"):
        if path.name == "modules.json" or "sentence_" in path.name:
            shutil.copyfile(path, directory / path.name)
    for folder in module_dirs(model_dir):
        if folder.resolve() != model_dir.resolve():
            shutil.copytree(folder, directory / folder.name, copy_function=shutil.copyfile, dirs_exist_ok=True)


def _stored_type(model_dir: Path) -> str:
    """The one type of the base's weights; empty when there are several."""
    headers = [read_safetensors_header(path)[0] for path in safetensors_files(model_dir)]
    types = {str(entry["dtype"]) for header in headers for entry in header.values() if len(entry["shape"]) > 1}
    return types.pop() if len(types) == 1 else ""


FULL: Method = Full()
