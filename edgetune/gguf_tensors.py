"""Rows of a GGUF file's tensors as float32, mapped from disk and dequantized piece by piece. Knows no model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import TENSOR_TYPES, GgufHeader, TensorInfo, read_gguf_header

_BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}
_ROWS_AT_ONCE = 1 << 22
"""Numbers dequantized in one piece by `iter_rows`: 16 MiB."""


class GgufTensors:
    """The tensors of one file, by name."""

    def __init__(self, source: Path | GgufHeader) -> None:
        header = read_gguf_header(source) if isinstance(source, Path) else source
        self._header = header
        self._infos: dict[str, TensorInfo] = {tensor.name: tensor for tensor in header.tensors}
        self._data: NDArray[np.uint8] = np.memmap(header.path, np.uint8, "r")

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor `name`, rows first: (out, in) for a matrix."""
        return tuple(reversed(self._info(name).shape))

    def read(self, name: str) -> NDArray[np.float32]:
        """The whole tensor `name`."""
        shape = self.shape(name)
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        return self.rows(name, 0, rows).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop` of the tensor `name`, (rows, row length).

        Raises `UsageError` for a tensor that is not there, `UnsupportedError` for a type that cannot be read here.
        """
        info = self._info(name)
        width = info.shape[0]
        block, size = _BLOCKS[info.type]
        row_bytes = width // block * size
        begin = self._header.data_start + info.offset
        raw = self._data[begin + start * row_bytes : begin + stop * row_bytes]
        return _dequantize(np.asarray(raw), info.type, name).reshape(stop - start, width)

    def take(self, name: str, rows: list[int]) -> NDArray[np.float32]:
        """Single rows of the tensor `name`, (len(rows), row length)."""
        return np.concatenate([self.rows(name, row, row + 1) for row in rows])

    def iter_rows(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows of the tensor `name` in pieces: (number of the first row, rows)."""
        count, width = self.shape(name)
        step = max(1, _ROWS_AT_ONCE // width)
        for start in range(0, count, step):
            yield start, self.rows(name, start, min(start + step, count))

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise UsageError(f"{self._header.path} has no tensor {name!r}.")
        return self._infos[name]


def _dequantize(raw: NDArray[np.uint8], kind: str, name: str) -> NDArray[np.float32]:
    if kind in ("F32", "F16", "F64"):
        plain: NDArray[Any] = raw.view({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[kind])
        return plain.astype(np.float32)
    import gguf

    try:
        values: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError) as error:
        raise UnsupportedError(f"{name} is stored as {kind}, which cannot be read here.") from error
    return values.astype(np.float32, copy=False)
