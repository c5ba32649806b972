"""What happens to a weight between the checkpoint and the GGUF file, as small values.

The same operation is applied to a whole weight, to some of its rows, and to a LoRA pair: llama.cpp adds B @ A to the
weight *after* the operation, so the pair has to go through it as well. Nothing here reads or writes files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Operation(Protocol):
    """A rearrangement or rescaling of a weight's rows (its output features)."""

    def apply(self, weight: Array) -> Array:
        """The weight (or a bias: one axis) as llama.cpp wants it."""

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        """The LoRA pair A (rank, in) and B (out, rank) of a weight that goes through `apply`."""


@dataclass(frozen=True)
class RotaryRows:
    """Hugging Face rotates the halves of a head against each other, llama.cpp's `llama` graph neighbouring pairs.

    Rows 0…n-1 and n…2n-1 of each head of 2n rows are interleaved.
    """

    head_dim: int

    def apply(self, weight: Array) -> Array:
        halves = weight.reshape(-1, 2, self.head_dim // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a, self.apply(b)


@dataclass(frozen=True)
class Transpose:
    """GPT-2's Conv1D keeps (in, out); llama.cpp wants (out, in). PEFT's A and B are (rank, in), (out, rank) already."""

    def apply(self, weight: Array) -> Array:
        return np.ascontiguousarray(weight.T)

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a, b


@dataclass(frozen=True)
class RowSlice:
    """Rows `start`…`stop` of the last matrix axis pair: one part of a fused projection."""

    start: int
    stop: int

    def apply(self, weight: Array) -> Array:
        return weight[self.start : self.stop] if weight.ndim == 1 else weight[..., self.start : self.stop, :]

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a, b[self.start : self.stop]


@dataclass(frozen=True)
class Add:
    """Adds a constant: Gemma stores its norms' gains minus one."""

    amount: float

    def apply(self, weight: Array) -> Array:
        return np.asarray(weight + np.float32(self.amount))

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a, b


@dataclass(frozen=True)
class Scale:
    """Multiplies by a constant: a factor of the model that the graph does not know."""

    factor: float

    def apply(self, weight: Array) -> Array:
        return np.asarray(weight * np.float32(self.factor))

    def apply_lora(self, a: Array, b: Array) -> tuple[Array, Array]:
        return a, self.apply(b)


def changes_values(operation: Operation) -> bool:
    """Whether `operation` computes new values, and so needs float32, rather than moving them."""
    return isinstance(operation, Add | Scale)
