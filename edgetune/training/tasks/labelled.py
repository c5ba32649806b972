"""Classification (one label or several a row) and regression: a head on an encoder's or a decoder's state.

The head is trained in full and saved with the adapter, and so is a pooler that the base has no weights for. A base that
is a classifier with these labels keeps its head. On decoders the head reads the last token, whatever the padding is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, TextTokenizer
from edgetune.data.columns import CLASSIFICATION, REGRESSION, Columns, Labelled, Scored
from edgetune.errors import DataError
from edgetune.events import Notice, Sink
from edgetune.training import metrics
from edgetune.training.evaluate import chosen_rows
from edgetune.training.tasks.base import Measured
from edgetune.training.tasks.choose import Kind
from edgetune.training.tasks.rows import Ids, RowBatch, RowTask

if TYPE_CHECKING:
    import torch

_MOST_LABELS = 10_000
_ROWS_TO_START = 16
_NAMED = 20
"""Labels that an error lists."""


@dataclass(frozen=True)
class HeadSequence:
    """A text (or pair) in ids, and what the head should say of it."""

    ids: Ids
    type_ids: Ids
    target: NDArray[np.float32]
    """(outputs,): a one for each label it has, or the number."""
    example: Labelled | Scored

    @property
    def learned(self) -> NDArray[np.bool_]:
        """No token is written."""
        return np.zeros(len(self.ids), dtype=bool)

    @property
    def learned_count(self) -> int:
        """One row, one thing to learn."""
        return 1


class _HeadTask(RowTask):
    """What classification and regression share."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    kinds: ClassVar[tuple[Kind, ...]] = ("encoder", "decoder")
    way_out: ClassVar[str] = "Give an encoder such as BERT, or a decoder; for source and target texts: --task seq2seq."

    outputs: int
    problem: str
    """transformers' name of the problem type."""
    keeps_head = False
    """Whether the base's own head goes on being trained."""

    def check_config(self, config: Any, architecture: str, model_dir: Path) -> None:
        """Give the head its size."""
        super().check_config(config, architecture, model_dir)
        config.num_labels = self.outputs
        config.problem_type = self.problem

    def head_modules(self, model: Any) -> list[str]:
        """Everything outside the body, and the pooler where the base has none."""
        heads = [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and any(True for _ in child.parameters())
        ]
        return heads + [name for name in super().frozen_modules(model) if not self.has_weights(model, name)]

    def frozen_modules(self, model: Any) -> list[str]:
        """A pooler that the base has."""
        return [name for name in super().frozen_modules(model) if self.has_weights(model, name)]

    def start(self, model: Any) -> None:
        """A head for other labels starts anew, also where its size is the same."""
        import torch

        if self.keeps_head:
            return
        generator = torch.Generator().manual_seed(self.settings.seed)
        last = _last_linear(model, self.outputs)
        with torch.no_grad():
            last.weight.copy_(torch.randn(last.weight.shape, generator=generator) * 0.02)
            if last.bias is not None:
                last.bias.zero_()

    def sequence(self, example: Any, tokenizer: TextTokenizer, max_length: int) -> tuple[HeadSequence, bool]:
        """The text as the tokenizer wraps it."""
        whole = tokenizer.encode_whole(example.first, example.second, max_length=max_length)
        return HeadSequence(whole.ids, whole.type_ids, self.target(example), example), whole.cut

    def target(self, example: Any) -> NDArray[np.float32]:
        """What the head should say."""
        raise NotImplementedError

    def weight(self, sequence: HeadSequence) -> float:
        """How much a row counts in the loss."""
        return 1.0

    def collate(self, sequences: Sequence[HeadSequence], device: torch.device) -> RowBatch:
        """Padded texts and their targets."""
        import torch

        inputs = self.padded([sequence.ids for sequence in sequences], device)
        if self.has_types:
            types = np.zeros(inputs["input_ids"].shape, dtype=np.int64)
            for row, sequence in enumerate(sequences):
                types[row, : len(sequence.type_ids)] = sequence.type_ids
            inputs["token_type_ids"] = torch.from_numpy(types).to(device)
        weights = [self.weight(sequence) for sequence in sequences]
        return RowBatch(
            inputs=inputs,
            labels=torch.from_numpy(np.stack([sequence.target for sequence in sequences])).to(device),
            tokens=sum(len(sequence.ids) for sequence in sequences),
            learned_tokens=len(sequences),
            denominator=sum(weights),
            extra={"weights": torch.tensor(weights, device=device)},
        )

    def logits(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """What the head says, in f32: (rows, outputs)."""
        if self.kind == "encoder":
            return model(**batch.inputs).logits.float()  # type: ignore[no-any-return]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.score(self._last_states(base, batch)).float()  # type: ignore[no-any-return]

    def _last_states(self, base: Any, batch: RowBatch) -> torch.Tensor:
        """A decoder's state at each row's last token: (rows, hidden)."""
        import torch

        body = getattr(base, base.base_model_prefix)
        hidden = body(**batch.inputs, use_cache=False).last_hidden_state  # (rows, tokens, hidden)
        last = batch.inputs["attention_mask"].sum(dim=1) - 1
        return hidden[torch.arange(len(last), device=last.device), last]  # type: ignore[no-any-return]

    def row_losses(self, logits: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        """The loss of each row: (rows,)."""
        raise NotImplementedError

    def summed_loss(self, model: Any, batch: RowBatch) -> torch.Tensor:
        """The rows' losses by their weights."""
        return (self.row_losses(self.logits(model, batch), batch) * batch.extra["weights"]).sum()

    def predict(self, model: Any, batch: RowBatch) -> tuple[torch.Tensor, Sequence[Any]]:
        """The loss and each row's logits."""
        logits = self.logits(model, batch)
        loss = (self.row_losses(logits, batch) * batch.extra["weights"]).sum()
        return loss, list(logits.cpu().numpy())


class ClassificationTask(_HeadTask):
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
        example, names = (
            sequence.example,
            [label for label, is_found in zip(self.labels, found, strict=True) if is_found],
        )
        assert isinstance(example, Labelled)
        wanted = list(example.labels)
        scores = {label: round(float(p), 6) for label, p in zip(self.labels, probabilities, strict=True)}
        told = (
            {"label": wanted, "predicted": names} if self.multi_label else {"label": wanted[0], "predicted": names[0]}
        )
        return {**_texts(example), **told, "scores": scores}

    def data_record(self) -> dict[str, Any]:
        """The labels, index = class id."""
        return {"labels": self.labels, "multi_label": self.multi_label}


class RegressionTask(_HeadTask):
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
        last = _last_linear(model, 1)
        model.eval()
        with torch.no_grad():
            state = self._last_states(model, batch).float().mean(dim=0)
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
            {**_texts(example), "score": example.score, "predicted": round(value, 6)}
            for example, value in zip(examples, found, strict=True)
        ]
        return Measured(metrics.regression([example.score for example in examples], found), rows)

    def settle(self, model: Any) -> None:
        """Make the head speak in the scores' own units."""
        import torch

        last = _last_linear(model, 1)
        with torch.no_grad():
            last.weight.mul_(self.scale)
            if last.bias is not None:
                last.bias.mul_(self.scale).add_(self.offset)
        self.offset, self.scale = 0.0, 1.0


def sort_labels(labels: Mapping[str, int] | Sequence[str]) -> list[str]:
    """Label names in the order of their ids: by number where all are whole numbers, else by text."""
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def _last_linear(model: Any, outputs: int) -> Any:
    """The head's last layer, that which is trained."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module.out_features == outputs
        and not name.startswith(f"{base.base_model_prefix}.")
        and "original_module" not in name
    ]
    return found[-1][1]


def _first(examples: Mapping[str, Sequence[tuple[str, Any]]], is_odd: Callable[[Any], bool]) -> str | None:
    return next((place for rows in examples.values() for place, example in rows if is_odd(example)), None)


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return ", ".join(labels[:_NAMED]) + more


def _texts(example: Labelled | Scored) -> dict[str, str]:
    return {"text": example.first} if example.second is None else {"text_a": example.first, "text_b": example.second}
