"""A matrix in ggml's quantized blocks, mapped from its file, and dequantized whenever its numbers are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune.gguf_tensors import dequantize_pieces

NUMBERS_AT_ONCE = 1 << 22
"""Numbers of a large matrix that exist at the same time where it is used piece by piece: 16 MiB in f32."""


@dataclass(frozen=True)
class Blocks:
    """Rows of one width, each a whole number of blocks: rows can be picked without touching their numbers."""

    raw: NDArray[np.uint8]
    """(rows, bytes of a row)"""
    kind: str
    """ggml's type, e.g. "Q4_K"."""
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return len(self.raw), self.columns

    def matrix(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """All numbers, (rows, columns)."""
        return self._numbers(self.raw, dtype, device)

    def pieces(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        """All numbers, some rows at a time: (number of the first row, (rows, columns))."""
        step = max(1, NUMBERS_AT_ONCE // self.columns)
        for at in range(0, len(self.raw), step):
            yield at, self._numbers(self.raw[at : at + step], dtype, device)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The rows `ids` (n,), each dequantized once: (n, columns)."""
        unique, places = torch.unique(ids.cpu(), return_inverse=True)
        numbers = self._numbers(self.raw[unique.numpy()], dtype, device)
        return numbers[places.to(device)]

    def _numbers(self, raw: NDArray[np.uint8], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        result = _empty(len(raw) * self.columns, dtype)

        def keep(start: int, numbers: NDArray[np.float32]) -> None:
            result[start : start + len(numbers)].copy_(torch.from_numpy(numbers))

        dequantize_pieces(raw.reshape(-1), self.kind, keep)
        return result.view(len(raw), self.columns).to(device)


def _empty(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for `count` numbers, (count,), that goes back to the system with the tensor.

    What is made and let go hundreds of times a step would leave holes in malloc's heap, which small tensors that stay
    keep from being used again: gigabytes of them.
    """
    return torch.frombuffer(mmap(-1, max(1, count) * dtype.itemsize), dtype=dtype)[:count]


def join(parts: list[Blocks]) -> Blocks:
    """The rows of all `parts`, which have one type and width, one after the other."""
    if len(parts) == 1:
        return parts[0]
    if len({(part.kind, part.columns) for part in parts}) > 1:
        raise ValueError("parts of one matrix have several types")
    return Blocks(np.concatenate([part.raw for part in parts]), parts[0].kind, parts[0].columns)
