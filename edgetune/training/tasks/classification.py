"""Classification: one label a row, or several where rows list theirs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset
from edgetune.data.columns import CLASSIFICATION, Columns, Labelled
from edgetune.errors import DataError
from edgetune.events import Notice, Sink
from edgetune.training import metrics
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.heads import HeadSequence, HeadTask, texts_of
from edgetune.training.tasks.rows import RowBatch

if TYPE_CHECKING:
    import torch

_MOST_LABELS = 10_000
_NAMED = 20
"""Labels that an error lists."""


class ClassificationTask(HeadTask):
    """One of the labels, or any number of them where rows list theirs."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.labels: list[str] = []
        self.multi_label = False
        self.weights: list[float] = []

    def formats(self) -> Sequence[Columns]:
        """Texts with labels."""
        return CLASSIFICATION

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """One for each label."""
        return len(self.labels)

    @property
    def problem(self) -> str:  # type: ignore[override]
        """By the rows."""
        return "multi_label_classification" if self.multi_label else "single_label_classification"

    @property
    def metrics(self) -> Mapping[str, bool]:
        """By the rows."""
        return metrics.MULTILABEL if self.multi_label else metrics.CLASSIFICATION

    def check_rows(self, dataset: Dataset, sink: Sink) -> Dataset:
        """Find the labels: those of the training rows, or the base's own where these are among them."""
        examples: Mapping[str, Sequence[tuple[str, Labelled]]] = dataset.examples
        train = examples["train"]
        self.multi_label = any(example.many for _, example in train)
        if not self.multi_label and (odd := _first(examples, lambda example: example.many)):
            raise DataError(f"{odd}: expected one label, as in the training rows, found a list.")
        if self.multi_label and (odd := _first(examples, lambda example: not example.many)):
            raise DataError(f"{odd}: expected a list of labels, as in other rows, found a single one.")
        counts = Counter(label for _, example in train for label in example.labels)
        self.labels = self._own_labels(counts) or sort_labels(counts)
        self._check_labels(counts)
        if self.settings.class_weights == "balanced":
            self.weights = self._balanced(counts, len(train))
        known = set(self.labels)
        kept: list[tuple[str, Labelled]] = []
        for place, example in examples.get("valid", ()):
            if unknown := [label for label in example.labels if label not in known]:
                problem = f"the label {unknown[0]!r} is in no training row (there: {_listed(self.labels)})"
                dataset.skipped.add(place, problem)
            else:
                kept.append((place, example))
        sink(Notice(f"{len(self.labels)} labels: {_listed(self.labels)}"))
        if "valid" not in examples:
            return dataset
        if not kept:
            raise DataError("No validation row has a label that is in the training rows.")
        return replace(dataset, examples={**examples, "valid": kept})

    def _check_labels(self, counts: Mapping[str, int]) -> None:
        if not counts:
            raise DataError("No training row has a label.", hint="Give rows with a label each.")
        if len(counts) == 1 and not self.multi_label:
            raise DataError(
                f"Every training row has the label {next(iter(counts))!r}: there is nothing to tell apart.",
                hint="Give rows of two labels or more.",
            )
        if len(counts) > _MOST_LABELS:
            raise DataError(
                f"The training rows have {len(counts):,} different labels, more than the {_MOST_LABELS:,} supported.",
                hint="If they are numbers, use --task regression.",
            )

    def _own_labels(self, counts: Mapping[str, int]) -> list[str]:
        """The base's labels, when it is a classifier that has all of these."""
        architecture = str((self.raw.get("architectures") or [""])[0])
        names = self.raw.get("id2label")
        several = self.raw.get("problem_type") == "multi_label_classification"
        if not architecture.endswith("ForSequenceClassification") or not names or several != self.multi_label:
            return []
        own = [str(names[key]) for key in sorted(names, key=int)]
        if own == [f"LABEL_{index}" for index in range(len(own))]:  # it names none
            own = [str(index) for index in range(len(own))]
        self.keeps_head = set(counts) <= set(own)
        return own if self.keeps_head else []

    def _balanced(self, counts: Mapping[str, int], rows: int) -> list[float]:
        if not self.multi_label:
            present = [label for label in self.labels if counts[label]]
            weights = dict(zip(present, metrics.balanced_weights([counts[label] for label in present]), strict=True))
            return [weights.get(label, 1.0) for label in self.labels]
        # A label that few rows have weighs as much where it is as where it is not.
        return [min(100.0, max(0.01, (rows - counts[label]) / max(1, counts[label]))) for label in self.labels]

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Write the labels into the config."""
        super().check_config(config, architecture, model_dir)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: index for index, label in enumerate(self.labels)}

    def target(self, example: Labelled) -> NDArray[np.float32]:
        """A one for each label."""
        found = np.zeros(len(self.labels), dtype=np.float32)
        found[[self.labels.index(label) for label in example.labels]] = 1
        return found

    def weight(self, sequence: HeadSequence) -> float:
        """Its class's weight, where classes are balanced."""
        if self.multi_label or not self.weights:
            return 1.0
        return self.weights[int(sequence.target.argmax())]

    def row_losses(self, logits: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        """Cross entropy over the labels; for several labels the mean of each one's own."""
        import torch

        if not self.multi_label:
            return torch.nn.functional.cross_entropy(logits, batch.labels.argmax(dim=1), reduction="none")
        weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, batch.labels, pos_weight=weights, reduction="none"
        )
        return losses.mean(dim=1)

    def measure(
        self, model: Any, sequences: Sequence[Any], said: Sequence[Any], tick: Callable[[int, int], None]
    ) -> Measured:
        """Accuracy and F1, and each row's label with its probabilities."""
        logits, true = np.stack(said).astype(np.float64), np.stack([sequence.target for sequence in sequences])
        if self.multi_label:
            found = logits > 0
            values = metrics.multilabel(true > 0.5, found)
            probabilities = 1 / (1 + np.exp(-logits))
            return Measured(values, [self._row(*row) for row in zip(sequences, probabilities, found, strict=True)])
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        values, confusion = metrics.classification(true.argmax(axis=1).tolist(), best.tolist(), len(self.labels))
        found = np.eye(len(self.labels), dtype=bool)[best]
        rows = [self._row(*row) for row in zip(sequences, probabilities, found, strict=True)]
        return Measured(values, rows, confusion)

    def _row(self, sequence: HeadSequence, probabilities: Any, found: Any) -> dict[str, Any]:
        example = sequence.example
        names = [label for label, is_found in zip(self.labels, found, strict=True) if is_found]
        assert isinstance(example, Labelled)
        wanted = list(example.labels)
        scores = {label: round(float(p), 6) for label, p in zip(self.labels, probabilities, strict=True)}
        told = (
            {"label": wanted, "predicted": names} if self.multi_label else {"label": wanted[0], "predicted": names[0]}
        )
        return {**texts_of(example), **told, "scores": scores}

    def data_record(self) -> dict[str, Any]:
        """The labels, index = class id."""
        return {"labels": self.labels, "multi_label": self.multi_label}


def sort_labels(labels: Mapping[str, int] | Sequence[str]) -> list[str]:
    """Label names in the order of their ids: by number where all are whole numbers, else by text."""
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _first(examples: Mapping[str, Sequence[tuple[str, Any]]], is_odd: Callable[[Any], bool]) -> str | None:
    return next((place for rows in examples.values() for place, example in rows if is_odd(example)), None)


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more
