"""What the model says of a few held-out rows before training and after it, kept in `samples.json` for the report.

A task that writes texts writes them greedily, with the model as it stands in training; of any other, what it predicted
of these rows is kept. A model that cannot write in training is no reason to stop: that is told, and nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from edgetune.events import Notice, Progress, Sink
from edgetune.paths import write_json
from edgetune.training.device import release_memory
from edgetune.training.evaluate import Evaluation, chosen_rows

SAMPLES = "samples.json"

LONGEST_PROMPT = 512
"""Tokens of the rows that are chosen, where there are such rows: a sample should not take long."""

Said = Mapping[str, Any]
"""A row and what the model says of it."""


def take_samples(
    run_dir: Path,
    when: Literal["before", "after"],
    *,
    task: Any,
    model: Any,
    rows: Sequence[Any],
    found: Evaluation | None,
    count: int,
    autocast: AbstractContextManager[Any],
    sink: Sink,
) -> None:
    """Note what `model` says now of `count` of `rows`, or what `found` says of them. Raises `ResourceError`."""
    if not count or not rows:
        return
    if hasattr(task, "write_samples"):
        short = [row for row in rows if len(row.ids) <= LONGEST_PROMPT]
        said = _written(task, model, chosen_rows(short or rows[:1], count), autocast, sink)
    else:
        said = chosen_rows(found.measured.predictions, count) if found is not None else []
    if said:
        write_json(run_dir / SAMPLES, {**read_samples(run_dir), when: said})


def read_samples(run_dir: Path) -> dict[str, list[Said]]:
    """What was noted "before" and "after"; what is not there, or cannot be read, is left out."""
    try:
        known = json.loads((run_dir / SAMPLES).read_text(encoding="utf-8"))
        return {when: known[when] for when in ("before", "after") if when in known}
    except (OSError, ValueError, TypeError):
        return {}


def _written(
    task: Any, model: Any, rows: Sequence[Any], autocast: AbstractContextManager[Any], sink: Sink
) -> Sequence[Said]:
    import torch

    def tick(done: int, whole: int) -> None:
        sink(Progress("evaluate", done, whole, "texts"))

    model.eval()
    try:
        with torch.no_grad(), autocast:
            said: Sequence[Said] = task.write_samples(model, rows, tick)
            return said
    except (RuntimeError, MemoryError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        problem = str(error).strip().split("\n")[0]
        sink(Notice(f"The report has no samples: this model does not write in training ({problem}).", "warning"))
    finally:
        model.train()
    release_memory(next(model.parameters()).device)
    return ()
