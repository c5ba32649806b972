"""Weights & Biases, offline: files in the run's own `wandb/`, sent by `wandb sync` when somebody wants that.

WANDB_MODE=online sends them at once; WANDB_PROJECT, WANDB_ENTITY and the rest mean what they mean to wandb.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from importlib import import_module
from typing import Any

from edgetune.artifacts import Run
from edgetune.training.reporters.base import Installed

_STEP = "step"
"""What curves are drawn over."""


class Wandb(Installed):
    """One W&B run, gone on with when ours is."""

    name, package = "Weights & Biases", "wandb"

    def __init__(self, run: Run, step: int) -> None:
        wandb: Any = import_module("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "edgetune"),
            name=run.path.name,
            id=sha256(f"{run.created} {run.path.resolve()}".encode()).hexdigest()[:16],
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(run.path.resolve()),
            config={**run.settings, "task": run.task, "base": run.base_name},
            # What the terminal shows is not for another process to read along.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own count of steps never goes back, as a run does that is gone on with from its checkpoint.
        self.run.define_metric(_STEP)
        self.run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """The values at their step."""
        self.run.log({_STEP: step} | {f"{split}/{name}": value for name, value in values.items()})

    def end(self, finished: bool) -> None:
        """Close it, as failed where it was stopped."""
        self.run.finish(exit_code=0 if finished else 1)
