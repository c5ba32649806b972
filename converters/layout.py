"""The way back: where the weights of a checkpoint lie in a GGUF file, so that they can be used from there as they are.

Only rearrangements of rows are undone, and sums and factors on vectors: a matrix stays in its quantized blocks, bit for
bit. What cannot be undone so is refused. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.base import EMBEDDING, HEAD, Target, Weight, find_family
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.operations import Add, RotaryRows, RowSlice, Scale


@dataclass(frozen=True)
class Piece:
    """Rows of a checkpoint's weight, and where they lie."""

    tensor: str
    """The GGUF tensor."""
    rows: NDArray[np.intp] | None = None
    """Its rows in the checkpoint's order; None: all of them, in their own."""
    add: float = 0.0
    """What has to be added to its values, after `factor`."""
    factor: float = 1.0
    """What its values have to be multiplied by."""


def locate_weights(values: Mapping[str, Any], tensors: Collection[str]) -> Mapping[str, tuple[Piece, ...]]:
    """Checkpoint name → the pieces whose rows, one after the other, are that weight.

    `values` are the fields of the checkpoint's config.json, `tensors` the names in the file. A tied head is left out.
    Raises `UnsupportedModel` for a family whose weights cannot be used from a GGUF file as they are,
    `CorruptCheckpoint` for a file that lacks some.
    """
    family = find_family(values)
    found = {}
    for name, entry in family.table.items():
        if name == family.head_name and HEAD not in tensors and EMBEDDING in tensors:
            continue
        pieces = tuple(_piece(entry, target) for target in sorted(entry.targets, key=_start))
        if missing := [piece.tensor for piece in pieces if piece.tensor not in tensors]:
            raise CorruptCheckpoint(f"The file lacks the tensor {missing[0]!r}.", hint="Convert or download it again.")
        found[name] = pieces
    return found


def _start(target: Target) -> int:
    return next((one.start for one in target.operations if isinstance(one, RowSlice)), 0)


def _piece(entry: Weight, target: Target) -> Piece:
    if target.expert is not None:
        raise UnsupportedModel(
            "Experts lie stacked in a GGUF file, and are not used from there.",
            hint="Train on the Hugging Face directory that the file was made from.",
        )
    settings: dict[str, Any] = {}
    for operation in target.operations:
        if isinstance(operation, RowSlice):
            continue
        if isinstance(operation, RotaryRows):
            order = operation.apply(np.arange(entry.shape[0], dtype=np.intp))
            settings["rows"] = np.argsort(order)
        elif isinstance(operation, Add) and len(entry.shape) == 1:
            settings["add"] = -operation.amount
        elif isinstance(operation, Scale):
            settings["factor"] = 1.0 / operation.factor
        else:
            raise UnsupportedModel(
                f"{entry.name!r} went through {type(operation).__name__} on its way into the file.",
                hint="Train on the Hugging Face directory that the file was made from.",
            )
    return Piece(target.name, **settings)


class GgufModel:
    """A base that is a GGUF file, as a checkpoint whose tensors have names and shapes, but no values to read."""

    def __init__(self, values: Mapping[str, Any], tensors: Collection[str]) -> None:
        """`values` are the fields of config.json, `tensors` the names in the file."""
        self.values = values
        family = find_family(values)
        self._shapes = {name: family.table[name].shape for name in locate_weights(values, tensors)}

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def names(self) -> Sequence[str]:
        """Every tensor's name in the checkpoint."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """What it would be read as."""
        return "F32"

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Refused: what an adapter holds beside LoRA pairs cannot be compared with quantized values."""
        raise UnsupportedModel(
            f"The adapter comes with values of its own for {name!r}, and the base is a GGUF file.",
            hint="Train it on the Hugging Face directory that the file was made from, and merge.",
        )
