"""Turns stored values into GGUF's: bfloat16, float16, float32 and Q8_0, on arrays of rows.

Pure functions on numpy arrays, meant for pieces of about a million values; numpy lets other threads run meanwhile.
Q8_0 and bfloat16 round as gguf-py does, so files come out equal to llama.cpp's own converter bit by bit.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.checkpoint import to_float32

Q8_0_BLOCK = 32
"""Values that share one scale in Q8_0; a row has to be a multiple of it."""


class TensorType(IntEnum):
    """GGML's number of each tensor type that is written here."""

    F32 = 0
    F16 = 1
    Q8_0 = 8
    BF16 = 30

    def row_bytes(self, width: int) -> int:
        """How many bytes a row of `width` values takes."""
        if self is TensorType.Q8_0:
            return width // Q8_0_BLOCK * (Q8_0_BLOCK + 2)
        return width * (4 if self is TensorType.F32 else 2)


STORED_AS = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
"""The tensor type that holds a safetensors dtype as it is."""


class OutOfRange(ValueError):
    """A value that float16 cannot hold, infinite or above 65504."""


def encode(raw: NDArray[Any], dtype: str, target: TensorType) -> NDArray[Any]:
    """Rows stored as `dtype` (see `checkpoint.STORAGE`), as the bytes of `target`. Raises `OutOfRange`."""
    if STORED_AS.get(dtype) is target:
        return raw
    if target is TensorType.F16:
        return _to_float16(raw, dtype)
    values = to_float32(raw, dtype)
    if target is TensorType.BF16:
        return _to_bfloat16(values)
    if target is TensorType.Q8_0:
        return _to_q8_0(values)
    return values


def _to_float16(raw: NDArray[Any], dtype: str) -> NDArray[np.float16]:
    if dtype == "BF16":
        # One look-up a value: 65536 answers fit a cache, and the table is right for all of them.
        half = np.take(_bfloat16_to_float16(), raw)
    else:
        with np.errstate(over="ignore"):
            half = raw.astype(np.float16)
    _require_finite(half)
    return half


def _require_finite(half: NDArray[np.float16]) -> None:
    # On the bits: numpy's isfinite takes longer than the conversion itself.
    if half.size and (half.view(np.uint16) & 0x7FFF).max() >= 0x7C00:
        raise OutOfRange


@lru_cache(maxsize=1)
def _bfloat16_to_float16() -> NDArray[np.float16]:
    with np.errstate(over="ignore", invalid="ignore"):
        return to_float32(np.arange(1 << 16, dtype=np.uint16), "BF16").astype(np.float16)


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to nearest, ties to even
    return np.where(nan, (bits >> 16) | 64, rounded).astype(np.uint16)


def _to_q8_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    rows = values.shape[0]
    blocks = values.reshape(-1, Q8_0_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    scaled = blocks * inverse
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = np.copysign(whole + np.floor(2 * (magnitude - whole)), scaled)  # half away from zero
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    _require_finite(half)
    return np.concatenate([half.view(np.uint8), rounded.astype(np.int8).view(np.uint8)], axis=1).reshape(rows, -1)
