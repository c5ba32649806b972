"""The way back: where the weights of a checkpoint lie in a GGUF file, so that they can be used from there as they are.

Only rearrangements of rows are undone, and sums and factors on vectors: a matrix stays in its quantized blocks, bit for
bit, and one that was transposed is said to be. What cannot be undone so is refused. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.base import EMBEDDING, HEAD, Family, Target, Weight, families, find_family, headless
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.operations import Add, RotaryRows, RowSlice, Scale, Transpose


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
    turned: bool = False
    """Whether the checkpoint has the matrix the other way round, (in, out)."""


def decoders() -> frozenset[str]:
    """What `general.architecture` is in files of the decoders whose weights can be located."""
    return frozenset(one.gguf_architecture for name, one in families().items() if headless(name))


def locate_weights(
    values: Mapping[str, Any], tensors: Collection[str], names: Sequence[str]
) -> Mapping[str, tuple[Piece, ...]]:
    """Name in the checkpoint → the pieces whose rows, one after the other, are that weight.

    `values` are the fields of the checkpoint's config.json, `tensors` the names in the file, `names` those that the
    checkpoint has, or the model in torch. Of experts in one stack, the rows follow each other expert by expert. A tied
    head is left out, and so is a name that the family does not know. Raises `UnsupportedModel` for a family whose
    weights cannot be used from a GGUF file as they are, `CorruptCheckpoint` for a file that lacks some.
    """
    family = find_family(values)
    family.adopt(names)
    held = _held(family, tensors)
    known = {name: held[family.canonical(name)] for name in names if family.canonical(name) in held}
    return {
        name: tuple(_piece(entry, target) for target in sorted(entry.targets, key=_start))
        for name, entry in known.items()
    }


def _held(family: Family, tensors: Collection[str]) -> dict[str, Weight]:
    """The family's weights but for a tied head; raises `CorruptCheckpoint` unless the file has them."""
    table = dict(family.table)
    if HEAD not in tensors and EMBEDDING in tensors:
        table.pop(family.head_name, None)
    missing = [target.name for entry in table.values() for target in entry.targets if target.name not in tensors]
    if missing:
        raise CorruptCheckpoint(f"The file lacks the tensor {missing[0]!r}.", hint="Convert or download it again.")
    return table


def _start(target: Target) -> int:
    return next((one.start for one in target.operations if isinstance(one, RowSlice)), 0)


def _piece(entry: Weight, target: Target) -> Piece:
    if target.expert is not None:
        raise UnsupportedModel(
            f"{entry.name!r} lies in a stack of experts, and is not used from there by itself.",
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
        elif isinstance(operation, Transpose):
            settings["turned"] = True
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
        self._shapes = {name: entry.shape for name, entry in _held(find_family(values), tensors).items()}

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
