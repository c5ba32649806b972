"""The head that was trained with an adapter: which one it is, and its values.

PEFT saves a classifier's new layers beside the LoRA pairs (modules_to_save); those it did not train are the base's. A
base without a head of its own had the one that transformers gives it (`…ForSequenceClassification`). Layers of the head
that have a LoRA pair of their own get it added here: a head is computed from its final values, by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.adapter_config import AdapterConfig
from converters.adapter_weights import AdapterFile, AdapterWeights, base_names
from converters.base import Family, classifier_of, find_family, headless
from converters.checkpoint import Checkpoint, load_float32
from converters.errors import UnsupportedAdapter

_PROBLEMS = {"regression": "regression", "multilabel": "multi_label_classification"}


@dataclass(frozen=True)
class TrainedHead:
    """What whoever trained an adapter knows of its head, and PEFT does not write down."""

    task: str = ""
    """ "classification", "multilabel", "regression", "embedding", or empty where nobody says."""
    labels: Sequence[str] = ()
    pooling: str = ""
    """Of embeddings: "cls", "mean", "last" or "max"; empty for what the base does."""


def adapted_family(values: Mapping[str, Any], config: AdapterConfig, file: AdapterFile, trained: TrainedHead) -> Family:
    """The family of the base with config.json `values`, with the head that it had when the adapter was trained."""
    family = find_family(values)
    if config.values.get("task_type") == "FEATURE_EXTRACTION" and (without := headless(family.architecture)):
        return find_family({**values, "architectures": [without]})
    name = classifier_of(family)
    if not name:
        return family
    classifier = type(family)({**values, "architectures": [name]})
    last = f"{classifier.head_layers(1)[1][-1].name}.weight"
    rows = next((file.shape(one)[0] for one in file.names if classifier.canonical(base_names(one)) == last), None)
    if rows is None and not family.is_classifier:
        if config.values.get("task_type") == "SEQ_CLS":
            raise UnsupportedAdapter(
                f"The adapter's task_type is SEQ_CLS, but neither it nor its base holds the layer {last!r}.",
                hint="Train with the layer in modules_to_save, so that the adapter holds it.",
            )
        return family
    return find_family({**values, "architectures": [name], **_labels(family, rows, trained)})


def _labels(family: Family, rows: int | None, trained: TrainedHead) -> dict[str, Any]:
    """The fields of config.json that say what a head with so many rows answers."""
    own = list(family.head.labels) if family.head else []
    count = len(own) if rows is None else rows
    labels = list(trained.labels)
    if labels and len(labels) != count:
        raise UnsupportedAdapter(
            f"The run names {len(labels)} labels, the adapter's head has {count} outputs.",
            hint="Use the adapter as it was trained, with the record beside it.",
        )
    labels = labels or (own if len(own) == count else [f"LABEL_{number}" for number in range(count)])
    problem = _PROBLEMS.get(trained.task) if trained.task else family.config.get("problem_type")
    if trained.task == "classification":
        problem = "single_label_classification"
    return {"id2label": {str(number): label for number, label in enumerate(labels)}, "problem_type": problem}


def head_loader(family: Family, weights: AdapterWeights, base: Checkpoint) -> Callable[[str], NDArray[np.float32]]:
    """Reads a tensor of the head: the adapter's where it has one, else the base's, with its LoRA pair added."""
    sources = {family.canonical(name): name for name in base.names}

    def load(name: str) -> NDArray[np.float32]:
        if name in weights.replaced:
            values = weights.file.load(weights.replaced[name])
        elif name in sources:
            values = load_float32(base, sources[name])
        else:
            raise UnsupportedAdapter(
                f"The head needs {name!r}, which neither the adapter nor its base holds.",
                hint="transformers made it up anew when the adapter was trained; train with it in modules_to_save.",
            )
        if lora := weights.loras.get(name):
            a, b = lora.read()
            values = values + np.float32(lora.scale) * (b @ a)
        return values

    return load
