"""TensorBoard: event files in the run's own `tensorboard/`; `tensorboard --logdir runs` shows many runs at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from edgetune.artifacts import Run
from edgetune.training.reporters.base import Installed


class TensorBoard(Installed):
    """Writes event files through torch's writer."""

    name, package = "TensorBoard", "tensorboard"

    def __init__(self, run: Run, step: int) -> None:
        module: Any = import_module("torch.utils.tensorboard")
        # What a killed run wrote past its checkpoint is hidden.
        self.writer = module.SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            text = json.dumps(dict(run.settings), indent=2, ensure_ascii=False)
            self.writer.add_text("settings", f"```json\n{text}\n```", 0)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """A scalar for each value."""
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def end(self, finished: bool) -> None:
        """Close the file."""
        self.writer.close()
