"""Rows of a GGUF file's tensors as float32, mapped from disk and dequantized piece by piece. Knows no model.

ggml's own routines dequantize, so that the numbers are those that llama.cpp computes with, for every type it has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import TENSOR_TYPES, GgufHeader, TensorInfo, read_gguf_header
from edgetune.hardware import physical_cores

_BLOCKS = {name: (block, size) for name, block, size in TENSOR_TYPES.values()}
_ROWS_AT_ONCE = 1 << 22
"""Numbers dequantized in one piece by `iter_rows`: 16 MiB."""

PIECE = 1 << 15
"""Numbers dequantized at once: 128 KiB."""


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
        return dequantize(np.asarray(raw), info.type).reshape(stop - start, width)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the mapped file, (rows, bytes of a row)."""
        info = self._info(name)
        block, size = _BLOCKS[info.type]
        begin = self._header.data_start + info.offset
        return self._data[begin : begin + info.nbytes].reshape(-1, info.shape[0] // block * size)

    def type(self, name: str) -> str:
        """How the tensor is stored, e.g. "Q4_K"."""
        return self._info(name).type

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


def dequantize(raw: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """The numbers in `raw`, whole blocks of ggml's type `kind`, in one axis.

    Raises `UnsupportedError` for a type that ggml cannot dequantize.
    """
    block, size = _BLOCKS[kind]
    result = np.empty(raw.size // size * block, np.float32)

    def keep(start: int, numbers: NDArray[np.float32]) -> None:
        result[start : start + len(numbers)] = numbers

    dequantize_pieces(raw, kind, keep)
    return result


def dequantize_pieces(raw: NDArray[np.uint8], kind: str, take: Callable[[int, NDArray[np.float32]], None]) -> None:
    """As `dequantize`, but hand the numbers to `take` piece by piece: (place of the first one, numbers).

    A piece fits into a processor's cache, and is only valid during the call. `take` is called from several threads.
    """
    block, size = _BLOCKS[kind]
    convert = _to_float(kind)
    if convert is None:
        raise UnsupportedError(f"Numbers stored as {kind} cannot be read here.")
    raw = np.ascontiguousarray(raw)
    count = raw.size // size * block
    step = PIECE // block * block

    def work(starts: range) -> None:
        scratch = np.empty(min(step, count), np.float32)
        for start in starts:
            stop = min(start + step, count)
            convert(raw.ctypes.data + start // block * size, scratch.ctypes.data, stop - start)
            take(start, scratch[: stop - start])

    starts, threads = range(0, count, step), _threads()
    if len(starts) < 2 * threads:
        work(starts)
    else:
        list(_pool().map(work, [starts[at::threads] for at in range(threads)]))


class _Traits(ctypes.Structure):
    """ggml's `ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


@lru_cache
def _to_float(kind: str) -> Callable[[int, int, int], object] | None:
    """ggml's routine: (address of blocks, address of floats, how many numbers); None when there is none."""
    if kind == "F32":
        return lambda source, target, count: ctypes.memmove(target, source, 4 * count)
    from llama_cpp._ggml import libggml

    libggml.ggml_get_type_traits.argtypes = [ctypes.c_int]
    libggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    number = next(number for number, (name, _, _) in TENSOR_TYPES.items() if name == kind)
    traits = libggml.ggml_get_type_traits(number).contents
    if (traits.blck_size, traits.type_size) != _BLOCKS[kind] or not traits.to_float:
        return None
    routine = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
    return cast(Callable[[int, int, int], object], routine)


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads())


@lru_cache
def _threads() -> int:
    return physical_cores()
