"""Writes a GGUF file front to back: header and metadata first, then tensors, in pieces, from several threads.

The tensors' types are settled only when they are written (a value may not fit float16), so the tensor table, whose
size does not depend on them, is filled in at the end. The caller provides a temporary path; nothing is renamed here.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.encoding import TensorType

Value = bool | int | float | str | Sequence[str] | Sequence[bytes] | Sequence[int] | Sequence[bool] | NDArray[Any]
"""A metadata value. Whole numbers are written as uint32 where they fit, sequences of them as int32."""

ALIGNMENT = 32
"""Tensors start at multiples of this many bytes."""

_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 6, 7, 8, 9, 10, 11
_ARRAY_TYPES = {"uint8": 0, "int8": 1, "uint32": _UINT32, "int32": _INT32, "float32": _FLOAT32, "bool": _BOOL}


class _State(Enum):
    NEW = "new"
    TENSORS = "tensors"
    FINISHED = "finished"


class GgufWriter:
    """One GGUF file in the making: `begin`, then `add` and `write` tensor by tensor, then `finish`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
        self._state = _State.NEW
        self._planned: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, tuple[TensorType, int]] = {}
        self._table_start = self._data_start = self._end = 0

    def begin(self, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Write the metadata, and leave room for the table of `tensors` (name → shape, first axis outermost)."""
        self._expect(_State.NEW)
        self._planned = dict(tensors)
        head = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
        head += b"".join(_pack_string(key) + pack_value(value) for key, value in metadata.items())
        self._table_start = len(head)
        table_bytes = sum(len(_table_entry(name, shape, TensorType.F32, 0)) for name, shape in tensors.items())
        self._data_start = self._end = _aligned(len(head) + table_bytes)
        self._write_at(head, 0)
        self._state = _State.TENSORS

    def add(self, name: str, tensor_type: TensorType) -> int:
        """Start the next tensor; returns where its bytes go. The last one may be added again, as another type."""
        self._expect(_State.TENSORS)
        if name not in self._planned:
            raise ValueError(f"{name} was not announced")
        again = self._types and name == next(reversed(self._types))
        if name in self._types and not again:
            raise ValueError(f"{name} was written already")
        start = self._types[name][1] if again else self._end
        shape = self._planned[name]
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        self._types[name] = (tensor_type, start)
        self._end = _aligned(start + rows * tensor_type.row_bytes(shape[-1]))
        return start

    def write(self, data: NDArray[Any], position: int) -> None:
        """Write bytes of a tensor at `position`, counted from the file's start. Safe to call from several threads."""
        self._write_at(np.ascontiguousarray(data).data.cast("B"), position)

    def finish(self) -> None:
        """Write the table of tensors and close the file; every announced tensor must have been added."""
        self._expect(_State.TENSORS)
        if missing := self._planned.keys() - self._types.keys():
            raise ValueError(f"never written: {sorted(missing)}")
        entries = (
            _table_entry(name, shape, self._types[name][0], self._types[name][1] - self._data_start)
            for name, shape in self._planned.items()
        )
        self._write_at(b"".join(entries), self._table_start)
        os.ftruncate(self._file, self._end)
        self._state = _State.FINISHED
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expect(self, state: _State) -> None:
        if self._state is not state:
            raise ValueError(f"the GGUF writer is {self._state.value}, not {state.value}")

    def _write_at(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written


def planned_bytes(metadata: Mapping[str, Value], tensors: Iterable[tuple[str, tuple[int, ...], TensorType]]) -> int:
    """About how large a file of these will be."""
    size = sum(len(key) + _value_bytes(value) + 32 for key, value in metadata.items())
    for name, shape, tensor_type in tensors:
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        size += _aligned(rows * tensor_type.row_bytes(shape[-1])) + len(name) + 64
    return size + ALIGNMENT


def _value_bytes(value: Value) -> int:
    """About how many bytes `value` takes; packing a vocabulary just to know would take as long as writing it."""
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if isinstance(value, str | bytes):
        return len(value)
    return (
        sum(8 + (len(item) if isinstance(item, str | bytes) else 0) for item in value) if isinstance(value, list) else 8
    )


def pack_value(value: Value) -> bytes:
    """A metadata value with its type in front, as GGUF holds it."""
    if isinstance(value, bool | np.bool_):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int | np.integer):
        return _pack_int(int(value))
    if isinstance(value, float | np.floating):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_string(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _ARRAY_TYPES[value.dtype.name], len(value)) + value.tobytes()
    if value and isinstance(value[0], bool):
        return pack_value(np.asarray(value, dtype=np.bool_))
    if value and isinstance(value[0], int):
        return pack_value(np.asarray(value, dtype=np.int32))
    texts = [text if isinstance(text, bytes) else str(text).encode() for text in value]
    packed = b"".join([len(text).to_bytes(8, "little") + text for text in texts])
    return struct.pack("<IIQ", _ARRAY, _STRING, len(texts)) + packed


def _pack_int(value: int) -> bytes:
    if 0 <= value < 1 << 32:
        return struct.pack("<II", _UINT32, value)
    if -(1 << 31) <= value < 0:
        return struct.pack("<Ii", _INT32, value)
    return struct.pack("<IQ", _UINT64, value) if value > 0 else struct.pack("<Iq", _INT64, value)


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _table_entry(name: str, shape: tuple[int, ...], tensor_type: TensorType, offset: int) -> bytes:
    sizes = tuple(reversed(shape))
    return _pack_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor_type, offset)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
