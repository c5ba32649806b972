"""Reads the tensors of a Hugging Face checkpoint: safetensors, single or sharded, a few rows at a time.

Everything a header says is checked against the file before a tensor is read. Nothing is memory-mapped: the pages of a
mapped file count as this process's memory, and reading rows keeps the peak near one chunk. Pickles are refused.
Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptCheckpoint, UnsupportedModel

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""safetensors dtype → how its values lie in memory; bfloat16 as raw 16-bit words."""

_BUFFERS = {"I64": 8, "I32": 4, "BOOL": 1}
"""Types of tensors that hold no weights, such as position numbers, and the size of their values."""
_MAX_HEADER_BYTES = 100_000_000
_AGAIN = "Download or save the checkpoint again."


class Checkpoint(Protocol):
    """Named tensors that can be read in pieces: a directory of safetensors, or one with an adapter merged into it."""

    @property
    def names(self) -> Sequence[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; its last axis is contiguous."""

    def dtype(self, name: str) -> str:
        """A key of `STORAGE`: "F64", "F32", "F16" or "BF16"; of what holds no weights, "I64" and the like."""

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start`…`stop` of the tensor seen as (product of the other axes, last axis), as stored (see `STORAGE`).

        A tensor of one axis is a single row. Safe to call from several threads.
        """


def load_float32(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """The whole tensor in float32, in its own shape."""
    shape = checkpoint.shape(name)
    raw = checkpoint.rows(name, 0, row_count(shape))
    return to_float32(raw, checkpoint.dtype(name)).reshape(shape)


def row_count(shape: tuple[int, ...]) -> int:
    """How many rows `Checkpoint.rows` sees in a tensor of `shape`."""
    return math.prod(shape[:-1])


def to_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Values stored as `dtype` (see `STORAGE`) in float32."""
    if dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Entry:
    file: int
    """Index into the open files."""
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""


class SafetensorsCheckpoint:
    """The safetensors of a Hugging Face model directory. Use as a context manager, or call `close`."""

    def __init__(self, model_dir: Path) -> None:
        """Open and check every file of `model_dir`.

        Raises `CorruptCheckpoint` for a broken file, `UnsupportedModel` for pickles and 8-bit tensors.
        """
        self._paths = find_safetensors(model_dir)
        self._files: list[int] = []
        self._entries: dict[str, _Entry] = {}
        try:
            for path in self._paths:
                self._files.append(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)))
                self._add_entries(path)
        except BaseException:
            self.close()
            raise
        _check_index(model_dir, set(self._entries))
        self._names = tuple(self._entries)

    @property
    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        return self._entries[name].dtype

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        entry = self._entries[name]
        width = entry.shape[-1] if entry.shape else 1
        storage = STORAGE[entry.dtype]
        data = bytearray((stop - start) * width * storage.itemsize)
        self._read_into(memoryview(data), entry, start * width * storage.itemsize)
        return np.frombuffer(data, storage).reshape(stop - start, width)

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> SafetensorsCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_entries(self, path: Path) -> None:
        header, data_start = read_header(path)
        for name, (dtype, shape, begin) in header.items():
            if name in self._entries:
                raise CorruptCheckpoint(f"{path.name} holds {name!r}, which another file holds too.", hint=_AGAIN)
            self._entries[name] = _Entry(len(self._files) - 1, dtype, shape, data_start + begin)

    def _read_into(self, view: memoryview, entry: _Entry, offset: int) -> None:
        done = 0
        while done < len(view):
            read = _read_at(self._files[entry.file], view[done:], entry.start + offset + done)
            if not read:
                raise CorruptCheckpoint(f"{self._paths[entry.file]} ended while it was read.", hint=_AGAIN)
            done += read


def find_safetensors(model_dir: Path) -> list[Path]:
    """The weight files of `model_dir`: the index's shards, or the single file.

    Raises `UnsupportedModel` when there are none, `CorruptCheckpoint` for a broken index or a missing shard.
    """
    weight_map = _read_index(model_dir)
    if weight_map is not None:
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            # A shard is a plain file name: an index must not lead out of its directory.
            if Path(shard).name != shard or "\\" in shard or not (model_dir / shard).is_file():
                raise CorruptCheckpoint(
                    f"{model_dir} lacks the weight file {shard!r} that its index names.", hint=_AGAIN
                )
        return [model_dir / shard for shard in shards]
    if (model_dir / "model.safetensors").is_file():
        return [model_dir / "model.safetensors"]
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in model_dir.glob(pattern)):
        raise UnsupportedModel(
            f"{model_dir} holds its weights as a pickle ({pickles[0]}), which can run code when loaded.",
            hint="Use the safetensors version of this model, or re-save it from a trusted copy with save_pretrained().",
        )
    raise UnsupportedModel(
        f"{model_dir} has no model.safetensors.",
        hint="Point to a Hugging Face model directory with safetensors weights.",
    )


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Read and check `path`'s header: name → (dtype, shape, begin), and where the data start (bytes)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CorruptCheckpoint(f"{path} is not a safetensors file, or is cut short ({size} bytes).", hint=_AGAIN)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CorruptCheckpoint(f"{path} has a broken safetensors header: {error}.", hint=_AGAIN) from error
    _check_layout(path, entries, size - 8 - length)
    return {name: (dtype, shape, begin) for name, (dtype, shape, begin, _) in entries.items()}, 8 + length


def _parse_entry(name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape = entry["dtype"], entry["shape"]
    begin, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name!r} has a shape or offsets that are not natural numbers")
    size = STORAGE[dtype].itemsize if dtype in STORAGE else _BUFFERS.get(dtype)
    if size is None:
        raise UnsupportedModel(
            f"The tensor {name!r} is stored as {dtype}, which is not a plain floating-point type.",
            hint="Use the full-precision (16 or 32 bit) version of this model and quantize it after the conversion.",
        )
    if math.prod(shape) * size != end - begin:
        raise ValueError(f"{name!r} is {shape} of {dtype}, but takes {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _check_layout(path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], data_bytes: int) -> None:
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if begin != position:
            problem = "overlaps another tensor" if begin < position else "leaves a gap before it"
            raise CorruptCheckpoint(f"{path} has a broken safetensors header: {name!r} {problem}.", hint=_AGAIN)
        position = end
    if position != data_bytes:
        raise CorruptCheckpoint(
            f"{path} holds {data_bytes} bytes of data, its header describes {position}: it is truncated or damaged.",
            hint=_AGAIN,
        )


def _read_index(model_dir: Path) -> dict[str, str] | None:
    path = model_dir / "model.safetensors.index.json"
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in (*weight_map.keys(), *weight_map.values())):
            raise ValueError("weight_map does not map names to files")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} is not a valid safetensors index: {error}.", hint=_AGAIN) from error
    return dict(weight_map)


def _check_index(model_dir: Path, held: set[str]) -> None:
    weight_map = _read_index(model_dir)
    if weight_map is None:
        return
    if missing := sorted(set(weight_map) - held):
        raise CorruptCheckpoint(
            f"{weight_map[missing[0]]} lacks the tensor {missing[0]!r} that the index places there.", hint=_AGAIN
        )


def _read_at(file: int, view: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], position)
    data = os.pread(file, len(view), position)
    view[: len(data)] = data
    return len(data)
