"""Training: settings → prepared data → one loop → a PEFT directory with its record.

Torch, transformers and peft load inside functions, when a run really starts.
"""

from __future__ import annotations

from edgetune.training.prepare import Plan, Prepared, plan, prepare
from edgetune.training.run import resume, train
from edgetune.training.run_dirs import newest_unfinished_run
from edgetune.training.settings import TrainSettings, flag_name, merge_settings, read_recipe

__all__ = [
    "Plan",
    "Prepared",
    "TrainSettings",
    "flag_name",
    "merge_settings",
    "newest_unfinished_run",
    "plan",
    "prepare",
    "read_recipe",
    "resume",
    "train",
]
