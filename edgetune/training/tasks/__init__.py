"""What a run trains for, by name. Each task is a small object that the one loop is handed; `base` says what it answers.

Another package adds one with an entry point in the group "edgetune.tasks": NAME = "its.module:TaskClass".
"""

from __future__ import annotations

from edgetune.training.registry import Registry
from edgetune.training.tasks.base import Batch, Measured, Task, TaskClass

__all__ = ["TASKS", "Batch", "Measured", "Task", "TaskClass", "find_task"]

_CAUSAL = "edgetune.training.tasks.causal:CausalTask"

TASKS: Registry[TaskClass] = Registry(
    "task",
    "edgetune.tasks",
    {
        "auto": _CAUSAL,
        "chat": _CAUSAL,
        "completion": _CAUSAL,
        "classification": "edgetune.training.tasks.classification:ClassificationTask",
        "regression": "edgetune.training.tasks.regression:RegressionTask",
        "embedding": "edgetune.training.tasks.embedding:EmbeddingTask",
        "seq2seq": "edgetune.training.tasks.seq2seq:Seq2SeqTask",
        "dpo": "edgetune.training.tasks.preference_pairs:DpoTask",
        "orpo": "edgetune.training.tasks.preference_pairs:OrpoTask",
        "simpo": "edgetune.training.tasks.preference_pairs:SimpoTask",
        "kto": "edgetune.training.tasks.preference_verdicts:KtoTask",
    },
)
"""Every known task."""


def find_task(name: str) -> Task:
    """A fresh object of the task called `name`. Raises `UsageError` when there is none."""
    return TASKS.find(name)(name)
