"""What follows a model's last hidden states, and llama.cpp's graphs do not compute: classifier, regression, projection.

A head is what is pooled of the hidden states and a list of layers after it. llama.cpp takes no tensors that it does not
know, so a head travels as metadata, in float32, in base files and adapter files alike. Here its keys are built; the
meaning of each is in docs/heads.md. Reads no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptCheckpoint
from converters.writer import Value

TASK_KEY, LABELS_KEY, POOLING_KEY = "edgetune.task", "edgetune.labels", "edgetune.head.pooling"
POOLING_TYPES = {"mean": 1, "cls": 2, "last": 3}
"""llama.cpp's numbers of the poolings that it has."""

_TASKS = {"regression": "regression", "multi_label_classification": "multilabel"}


@dataclass(frozen=True)
class Layer:
    """A layer of a head: a matrix and a bias, or a LayerNorm, and an activation after it."""

    name: str
    """The module whose `weight` and `bias` these are, as the family's table spells it."""
    inputs: int
    outputs: int
    kind: str = "dense"
    """ "dense" or "layer_norm"."""
    bias: bool = True
    activation: str = "none"
    eps: float = 0.0

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The layer's tensors with their shapes."""
        yield f"{self.name}.weight", (self.outputs, self.inputs) if self.kind == "dense" else (self.outputs,)
        if self.bias:
            yield f"{self.name}.bias", (self.outputs,)


@dataclass(frozen=True)
class Head:
    """A head: what is pooled, what is computed of it, and what the numbers mean."""

    task: str
    """ "classification", "multilabel", "regression" or "embedding"."""
    pooling: str = ""
    """ "cls" (the first token), "mean", "last" or "max"; empty where the model does not say."""
    layers: tuple[Layer, ...] = ()
    labels: tuple[str, ...] = ()
    normalize: bool = False


def head_metadata(head: Head, load: Callable[[str], NDArray[np.float32]]) -> dict[str, Value]:
    """The keys of `head`, whose tensors `load` reads by name."""
    keys: dict[str, Value] = {TASK_KEY: head.task}
    if head.labels and head.task in ("classification", "multilabel"):
        keys[LABELS_KEY] = list(head.labels)
    if not head.pooling:
        return keys
    keys |= {POOLING_KEY: head.pooling, "edgetune.head.count": len(head.layers)}
    for number, layer in enumerate(head.layers):
        keys |= {f"edgetune.head.{number}.{key}": value for key, value in _layer_keys(layer, load).items()}
    return {**keys, "edgetune.head.normalize": head.normalize}


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a classifier by class id, as transformers reads them from config.json."""
    named = config.get("id2label")
    if named is None:
        count = config.get("num_labels")
        count = count if isinstance(count, int) and not isinstance(count, bool) else 2
        return tuple(f"LABEL_{number}" for number in range(count))
    try:
        labels = {int(number): str(label) for number, label in named.items()}
        return tuple(labels[number] for number in range(len(labels)))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CorruptCheckpoint(
            f"config.json gives id2label as {named!r}, not a label for each number from 0 on."
        ) from error


def classifier_task(problem_type: object, labels: Sequence[str]) -> str:
    """What a classifier's numbers mean, by transformers' `problem_type` and how many there are."""
    if problem_type is None and len(labels) == 1:
        return "regression"
    return _TASKS.get(str(problem_type), "classification")


def _layer_keys(layer: Layer, load: Callable[[str], NDArray[np.float32]]) -> dict[str, Value]:
    keys: dict[str, Value] = {"kind": layer.kind, "activation": layer.activation}
    if layer.kind == "dense":
        keys |= {"in": layer.inputs, "out": layer.outputs}
    else:
        keys["eps"] = layer.eps
    for name, shape in layer.shapes():
        values = load(name)
        if values.shape != shape:
            raise CorruptCheckpoint(
                f"The head's {name!r} is {' x '.join(map(str, values.shape))}, not {' x '.join(map(str, shape))}."
            )
        if not np.isfinite(values).all():
            raise CorruptCheckpoint(f"The head's {name!r} holds infinite or undefined values.")
        keys[name.rpartition(".")[2]] = np.ascontiguousarray(values, np.float32).reshape(-1)
    return keys
