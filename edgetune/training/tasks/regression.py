"""Regression: a number for each text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset
from edgetune.data.columns import REGRESSION, Columns, Scored
from edgetune.errors import DataError
from edgetune.events import Sink
from edgetune.training import metrics
from edgetune.training.evaluate import chosen_rows
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.heads import HeadTask, last_linear, texts_of
from edgetune.training.tasks.rows import RowBatch

if TYPE_CHECKING:
    import torch

_ROWS_TO_START = 16


class RegressionTask(HeadTask):
    """A number for each text. Learned in units of the training scores' spread; the saved head speaks in theirs."""

    outputs = 1
    problem = "regression"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.mean, self.offset, self.scale = 0.0, 0.0, 1.0
        """What the head says, times scale plus offset, is the score; until `settle` puts them into the head."""

    def formats(self) -> Sequence[Columns]:
        """Texts with numbers."""
        return REGRESSION

    @property
    def metrics(self) -> Mapping[str, bool]:
        """Errors and correlations."""
        return metrics.REGRESSION

    def check_rows(self, dataset: Dataset, sink: Sink) -> Dataset:
        """Find the scores' spread."""
        scores = np.asarray([example.score for _, example in dataset.examples["train"]], dtype=np.float64)
        if scores.min() == scores.max():
            raise DataError(
                f"Every training row has the score {scores[0]:g}: there is nothing to tell apart.",
                hint="Give rows of different scores.",
            )
        architecture = str((self.raw.get("architectures") or [""])[0])
        labels = self.raw.get("id2label") or {0: "", 1: ""}  # transformers leaves out its default, two labels
        self.keeps_head = architecture.endswith("ForSequenceClassification") and len(labels) == 1
        if not self.keeps_head:
            self.scale = float(scores.std())
            # Decoders' heads have no bias: what they say can be scaled but not moved, so `start` moves it.
            self.mean = float(scores.mean())
            self.offset = self.mean if self.kind == "encoder" else 0.0
        return dataset

    def start(self, model: Any) -> None:
        """A head without a bias starts by saying the mean score of the mean state."""
        import torch

        super().start(model)
        if self.keeps_head or self.kind == "encoder":
            return
        batch = self.collate(chosen_rows(self.train_sequences, _ROWS_TO_START), torch.device("cpu"))
        last = last_linear(model, 1)
        model.eval()
        with torch.no_grad():
            state = self.last_states(model, batch).float().mean(dim=0)
            wanted = self.mean / self.scale - float(last.weight[0].float() @ state)
            last.weight[0] += (state * (wanted / float(state @ state))).to(last.weight.dtype)

    def target(self, example: Scored) -> NDArray[np.float32]:
        """The score."""
        return np.asarray([example.score], dtype=np.float32)

    def row_losses(self, logits: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        """The squared error, in units of the spread."""
        wanted = (batch.labels[:, 0] - self.offset) / self.scale
        return (logits[:, 0] - wanted) ** 2

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Errors in the scores' own units, and each row's value."""
        found = [float(logits[0]) * self.scale + self.offset for logits in said]
        examples = [sequence.example for sequence in sequences]
        rows = [
            {**texts_of(example), "score": example.score, "predicted": round(value, 6)}
            for example, value in zip(examples, found, strict=True)
        ]
        return Measured(metrics.regression([example.score for example in examples], found), rows)

    def settle(self, model: Any) -> None:
        """Make the head speak in the scores' own units."""
        import torch

        last = last_linear(model, 1)
        with torch.no_grad():
            last.weight.mul_(self.scale)
            if last.bias is not None:
                last.bias.mul_(self.scale).add_(self.offset)
        self.offset, self.scale = 0.0, 1.0
