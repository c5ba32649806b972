"""Measuring the validation rows: the loss and what the task measures, the same way in the loop and at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from edgetune.events import Progress, Sink
from edgetune.training.tasks import Batch, Measured, Task


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    loss: float
    measured: Measured

    @property
    def values(self) -> dict[str, float]:
        """The loss and every metric by name."""
        return {"loss": self.loss, **self.measured.values}


def chosen_rows(rows: Sequence[Any], most: int) -> list[Any]:
    """Up to `most` of `rows`, evenly spread over them: files are often sorted, by label say."""
    if len(rows) <= most:
        return list(rows)
    return [rows[index * len(rows) // most] for index in range(most)]


def evaluate(
    task: Task,
    adapted: Any,
    rows: Sequence[Any],
    *,
    batch_size: int,
    batches: Callable[[Sequence[Any]], Sequence[Batch]],
    autocast: AbstractContextManager[Any],
    sink: Sink,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Measure `rows`, `batch_size` of them at a time, laid out by `batches`; None when told to stop meanwhile.

    Leaves the model in training mode.
    """
    import torch

    # Similar lengths come together, to pad little; what is said of the rows is told in their own order.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    said: dict[int, Any] = {}
    total, denominator = 0.0, 0.0
    adapted.eval()
    try:
        with torch.no_grad(), autocast:
            for at in range(0, len(order), batch_size):
                if should_stop():
                    return None
                indices = order[at : at + batch_size]
                told: list[Any] = []
                for batch in batches([rows[index] for index in indices]):
                    loss, found = task.predict(adapted, batch)
                    told += found
                    total += float(loss)
                    denominator += batch.denominator
                said.update(zip(indices, told, strict=bool(told)))
                sink(Progress("evaluate", min(at + batch_size, len(rows)), len(rows), "rows"))
            in_order = [said[index] for index in range(len(rows))] if said else []
            measured = task.measure(
                adapted, rows, in_order, lambda done, whole: sink(Progress("evaluate", done, whole, "texts"))
            )
    finally:
        adapted.train()
    return Evaluation(total / denominator, measured)
