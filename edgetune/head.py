"""What follows an encoder's last hidden states: pooling, the layers of a classifier or projection, labels, normalising.

llama.cpp takes no tensors that it does not know, so a head travels as GGUF metadata (docs/heads.md) and is computed
here, in float32 with numpy. A head in an adapter's file replaces its base's. Knows nothing of tokens or of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.gguf_header import GgufHeader, read_gguf_header

Array = NDArray[np.float32]
Pooling = Literal["mean", "cls", "last", "max"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""What can be taken from the last hidden states: their mean, the first, the last, the largest of each dimension."""

KEY_PREFIXES = ("edgetune.task", "edgetune.labels", "edgetune.head.")
"""GGUF keys that `read_head` needs, however long their arrays are."""

LLAMA_POOLINGS: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
"""llama.cpp's `<architecture>.pooling_type` → its name here."""

_HINT = "Convert it again."


def _gelu(values: Array) -> Array:
    erf = np.asarray(np.frompyfunc(math.erf, 1, 1)(values.astype(np.float64) / math.sqrt(2)), np.float64)
    return np.asarray(values * 0.5 * (1 + erf), np.float32)


def _gelu_tanh(values: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)
    return np.asarray(0.5 * values * (1 + np.tanh(inner)), np.float32)


def sigmoid(values: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)), np.float32)


def softmax(values: Array) -> Array:
    """Probabilities along the last axis."""
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def normalized(rows: Array) -> Array:
    """Rows of length 1; a row of zeros stays one."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12), np.float32)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda values: values,
    "tanh": np.tanh,
    "relu": lambda values: np.maximum(values, 0),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda values: values * sigmoid(values),
    "sigmoid": sigmoid,
}
"""Activation by its name in the file."""


@dataclass(frozen=True)
class HeadLayer:
    """A matrix with a bias, or a LayerNorm, and what is applied to its result."""

    kind: Literal["dense", "layer_norm"]
    weight: Array
    """(out, in), of a LayerNorm (width,)."""
    bias: Array | None = None
    activation: str = "none"
    eps: float = 1e-5

    def apply(self, rows: Array) -> Array:
        """(n, in) → (n, out)."""
        if self.kind == "dense":
            rows = rows @ self.weight.T
        else:
            centred = rows - rows.mean(axis=-1, keepdims=True)
            rows = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self.eps) * self.weight
        if self.bias is not None:
            rows = rows + self.bias
        return np.asarray(ACTIVATIONS[self.activation](rows), np.float32)

    @property
    def inputs(self) -> int:
        """Width of what it takes."""
        return int(self.weight.shape[-1])

    @property
    def outputs(self) -> int:
        """Width of what it gives."""
        return int(self.weight.shape[0])


@dataclass(frozen=True)
class Head:
    """What is computed of the hidden states, and what the numbers mean."""

    task: str
    """ "classification", "multilabel", "regression" or "embedding"."""
    labels: tuple[str, ...] = ()
    pooling: Pooling | None = None
    """None where the model does not say."""
    layers: tuple[HeadLayer, ...] = ()
    normalize: bool = False

    @property
    def scores_texts(self) -> bool:
        """Whether it turns a text into labels or a number."""
        return self.task in ("classification", "multilabel", "regression") and bool(self.layers)

    def apply(self, pooled: Array) -> Array:
        """Pooled states (n, hidden) through the layers: (n, out)."""
        for layer in self.layers:
            pooled = layer.apply(pooled)
        return pooled

    def check_width(self, hidden: int, path: Path) -> None:
        """Raise `CorruptFileError` unless the head fits hidden states of this width, and its labels its outputs."""
        width = hidden
        for number, layer in enumerate(self.layers):
            if layer.inputs != width:
                raise CorruptFileError(
                    f"Layer {number} of the head in {path} takes {layer.inputs} numbers, and gets {width}.", hint=_HINT
                )
            width = layer.outputs
        if self.labels and self.scores_texts and len(self.labels) != width:
            raise CorruptFileError(f"The head in {path} has {width} outputs and {len(self.labels)} labels.", hint=_HINT)


def read_head(source: Path | GgufHeader) -> Head | None:
    """The head in a GGUF model or adapter; None where the file records none.

    Raises `CorruptFileError` for one that contradicts itself, `UnsupportedError` for a layer of an unknown kind.
    """
    path = source if isinstance(source, Path) else source.path
    metadata = read_gguf_header(path, arrays=KEY_PREFIXES).metadata
    if "edgetune.task" not in metadata and "edgetune.head.count" not in metadata:
        return None
    labels = metadata.get("edgetune.labels", [])
    pooling = metadata.get("edgetune.head.pooling")
    if pooling not in (None, "", *POOLINGS):
        raise UnsupportedError(f"{path} pools by {pooling!r}, which is unknown here.", hint="Update edgetune.")
    count = metadata.get("edgetune.head.count", 0)
    layers = [_read_layer(metadata, f"edgetune.head.{number}", path) for number in range(int(_number(count)))]
    return Head(
        task=str(metadata.get("edgetune.task", "embedding")),
        labels=tuple(str(label) for label in labels) if isinstance(labels, list) else (),
        pooling=next((known for known in POOLINGS if known == pooling), None),
        layers=tuple(layers),
        normalize=metadata.get("edgetune.head.normalize") is True,
    )


def pool(states: Array, lengths: Sequence[int], pooling: Pooling) -> Array:
    """One row a sequence from the hidden states of several, one after the other: (tokens, hidden) → (n, hidden)."""
    ends = np.cumsum(lengths)
    starts = ends - np.asarray(lengths)
    if pooling == "cls":
        return np.asarray(states[starts], np.float32)
    if pooling == "last":
        return np.asarray(states[ends - 1], np.float32)
    if pooling == "max":
        return np.asarray(np.maximum.reduceat(states, starts, axis=0), np.float32)
    return np.asarray(np.add.reduceat(states, starts, axis=0) / np.asarray(lengths, np.float32)[:, None], np.float32)


def _read_layer(metadata: Mapping[str, Any], key: str, path: Path) -> HeadLayer:
    kind, activation = metadata.get(f"{key}.kind"), str(metadata.get(f"{key}.activation", "none"))
    if kind not in ("dense", "layer_norm") or activation not in ACTIVATIONS:
        what = f"a layer of kind {kind!r}" if kind not in ("dense", "layer_norm") else f"the activation {activation!r}"
        raise UnsupportedError(f"The head in {path} has {what}, which is unknown here.", hint="Update edgetune.")
    weight, bias = _array(metadata.get(f"{key}.weight")), metadata.get(f"{key}.bias")
    eps = _number(metadata.get(f"{key}.eps", 1e-5))
    if kind == "dense":
        shape = int(_number(metadata.get(f"{key}.out"))), int(_number(metadata.get(f"{key}.in")))
        if math.prod(shape) != weight.size or not weight.size:
            raise CorruptFileError(f"{key} in {path} has {weight.size} weights, not {shape[0]} × {shape[1]}.")
        weight = weight.reshape(shape)
    layer = HeadLayer(
        "dense" if kind == "dense" else "layer_norm",
        weight,
        None if bias is None else _array(bias),
        activation,
        eps,
    )
    if layer.bias is not None and layer.bias.size != layer.outputs:
        raise CorruptFileError(f"{key} in {path} has {layer.bias.size} biases for {layer.outputs} outputs.", hint=_HINT)
    return layer


def _array(value: Any) -> Array:
    return np.asarray(value if isinstance(value, list) else [], np.float32)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
