"""Moves one tensor from the checkpoint to the GGUF file, in pieces of about a million values, on several threads.

A piece is a run of rows that its operations can be applied to alone. What float16 cannot hold makes the whole tensor
start over in a wider type.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from converters.checkpoint import Checkpoint, row_count, to_float32
from converters.encoding import OutOfRange, TensorType, encode
from converters.operations import Operation, RotaryRows, RowSlice, Transpose, changes_values
from converters.plan import Output, Part
from converters.writer import GgufWriter

_VALUES_AT_ONCE = 1 << 20


def write_tensor(
    writer: GgufWriter, pool: ThreadPoolExecutor, checkpoint: Checkpoint, output: Output, tensor_type: TensorType
) -> None:
    """Write `output` as `tensor_type`, or as bfloat16 or float32 when that is too narrow for its values."""
    try:
        _write_pieces(writer, pool, checkpoint, output, tensor_type)
    except OutOfRange:
        stored = {checkpoint.dtype(part.source) for part in output.parts}
        _write_pieces(writer, pool, checkpoint, output, TensorType.BF16 if stored == {"BF16"} else TensorType.F32)


@dataclass(frozen=True)
class _Piece:
    part: Part
    start: int
    stop: int
    """Rows of the checkpoint tensor."""
    operations: tuple[Operation, ...]
    """Those left to apply to these rows."""
    row: int
    """The row of the GGUF tensor where the piece goes."""


def _write_pieces(
    writer: GgufWriter, pool: ThreadPoolExecutor, checkpoint: Checkpoint, output: Output, tensor_type: TensorType
) -> None:
    start = writer.add(output.name, tensor_type)
    row_bytes = tensor_type.row_bytes(output.shape[-1])

    def write(piece: _Piece) -> None:
        values, dtype = _load(checkpoint, piece)
        writer.write(encode(values, dtype, tensor_type), start + piece.row * row_bytes)

    pieces = list(_pieces(checkpoint, output))
    if len(pieces) == 1:
        write(pieces[0])
        return
    running = [pool.submit(write, piece) for piece in pieces]
    # All of them end before the first error is raised: none may still write when the tensor is started over.
    for error in [error for error in (one.exception() for one in running) if error is not None]:
        raise error


def _load(checkpoint: Checkpoint, piece: _Piece) -> tuple[NDArray[Any], str]:
    source = piece.part.source
    shape, dtype = checkpoint.shape(source), checkpoint.dtype(source)
    values = checkpoint.rows(source, piece.start, piece.stop)
    if len(shape) == 1:
        values = values.reshape(-1)
    if any(map(changes_values, piece.operations)):
        values, dtype = to_float32(values, dtype), "F32"
    for operation in piece.operations:
        values = operation.apply(values)
    return (values.reshape(1, -1) if values.ndim == 1 else values), dtype


def _pieces(checkpoint: Checkpoint, output: Output) -> Iterator[_Piece]:
    row = 0
    for part in output.parts:
        shape = checkpoint.shape(part.source)
        if len(shape) == 1 or any(isinstance(operation, Transpose) for operation in part.operations):
            yield _Piece(part, 0, row_count(shape), part.operations, row)
            row += row_count(output.shape) // len(output.parts)
            continue
        operations = tuple(one for one in part.operations if not isinstance(one, RowSlice))
        granule = max([1, *(one.head_dim for one in operations if isinstance(one, RotaryRows))])
        step = max(1, _VALUES_AT_ONCE // shape[-1] // granule) * granule
        for first, last in _row_runs(shape, part.operations):
            for start in range(first, last, step):
                stop = min(last, start + step)
                yield _Piece(part, start, stop, operations, row)
                row += stop - start


def _row_runs(shape: tuple[int, ...], operations: tuple[Operation, ...]) -> Iterator[tuple[int, int]]:
    """The runs of rows that are kept, of a tensor seen as (rows, last axis)."""
    kept = [one for one in operations if isinstance(one, RowSlice)]
    if not kept:
        yield 0, row_count(shape)
        return
    for matrix in range(row_count(shape[:-1])):
        begin = matrix * shape[-2]
        yield begin + kept[0].start, begin + kept[0].stop
