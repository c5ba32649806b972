"""Matches what a checkpoint holds against what its family expects: every tensor exactly once, in the expected shape.

The outcome is a list of GGUF tensors, each with the checkpoint tensors it is made of. Reads a tied head's values to see
that it is the embedding; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from converters.base import Family
from converters.checkpoint import STORAGE, Checkpoint, row_count
from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.operations import Operation, RowSlice, Transpose

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Part:
    """A checkpoint tensor on its way into a GGUF tensor."""

    source: str
    operations: tuple[Operation, ...] = ()


@dataclass
class Output:
    """A GGUF tensor and what it is made of."""

    name: str
    shape: tuple[int, ...]
    """First axis outermost, as numpy has it."""
    parts: list[Part] = field(default_factory=list)
    """One, or one for each expert of a stack."""


def plan(family: Family, checkpoint: Checkpoint) -> list[Output]:
    """The GGUF tensors of `checkpoint`, in the checkpoint's order.

    Raises `CorruptCheckpoint` for a missing tensor or a wrong shape, `UnsupportedModel` for an unknown one.
    """
    family.adopt(checkpoint.names)
    sources = _match(family, checkpoint)
    _settle_head(family, checkpoint, sources)
    stacks: dict[str, dict[int | None, tuple[Part, tuple[int, ...]]]] = {}
    for name, source in sources.items():
        entry = family.table[name]
        if checkpoint.shape(source) != entry.shape:
            raise CorruptCheckpoint(
                f"The tensor {source!r} is {_text(checkpoint.shape(source))}, by config.json {_text(entry.shape)}.",
                hint="Use the config.json that belongs to these weights.",
            )
        for target in entry.targets:
            shape = _shape_after(entry.shape, target.operations)
            stacks.setdefault(target.name, {})[target.expert] = (Part(source, target.operations), shape)
    return [_output(name, slots) for name, slots in stacks.items()]


def _match(family: Family, checkpoint: Checkpoint) -> dict[str, str]:
    """Table name → checkpoint name."""
    sources: dict[str, str] = {}
    unknown = []
    for source in checkpoint.names:
        name = family.canonical(source)
        if name in family.table:
            if checkpoint.dtype(source) not in STORAGE:
                raise UnsupportedModel(
                    f"The tensor {source!r} is stored as {checkpoint.dtype(source)}, which is not a plain "
                    "floating-point type."
                )
            if name not in sources:
                sources[name] = source
            elif not family.may_repeat(source):
                raise CorruptCheckpoint(f"The checkpoint holds {name!r} twice, as {sources[name]!r} and {source!r}.")
            elif not equal_tensors(checkpoint, source, sources[name]):
                raise UnsupportedModel(
                    f"The checkpoint's {source!r} differs from its {sources[name]!r}; llama.cpp's graph for this model "
                    "shares them."
                )
        elif not family.is_ignored(name):
            unknown.append(source)
    if unknown:
        raise UnsupportedModel(
            f"The checkpoint holds {_listed(unknown)}, which {family.architectures[0]} has no place for.",
            hint="Another model's or an adapter's tensors may have been saved with it; without them it would differ.",
        )
    missing = [name for name in family.table if name not in sources]
    if family.tied:
        missing = [name for name in missing if name not in (family.head_name, family.embedding_name)]
        if family.head_name not in sources and family.embedding_name not in sources:
            missing.append(family.embedding_name)
    if missing:
        raise CorruptCheckpoint(
            f"The checkpoint lacks {_listed(missing)}.",
            hint="Download or save the checkpoint again, with all of its files.",
        )
    return sources


def _settle_head(family: Family, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    """A tied head is the embedding under either name; one that differs is kept, as transformers keeps it."""
    if not family.tied or family.head_name not in sources:
        return
    head = sources[family.head_name]
    if family.embedding_name not in sources:
        sources[family.embedding_name] = sources.pop(family.head_name)
    elif equal_tensors(checkpoint, head, sources[family.embedding_name]):
        del sources[family.head_name]
    elif not family.graph_has_head:
        raise UnsupportedModel(
            f"The checkpoint's {head!r} differs from its embedding; llama.cpp's graph for this model shares them."
        )


def equal_tensors(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors hold the same values in the same dtype and shape."""
    shape = checkpoint.shape(first)
    if shape != checkpoint.shape(second) or checkpoint.dtype(first) != checkpoint.dtype(second):
        return False
    rows = row_count(shape)
    for start in range(0, rows, _ROWS_AT_ONCE):
        stop = min(rows, start + _ROWS_AT_ONCE)
        if not np.array_equal(checkpoint.rows(first, start, stop), checkpoint.rows(second, start, stop)):
            return False
    return True


def _output(name: str, slots: dict[int | None, tuple[Part, tuple[int, ...]]]) -> Output:
    part, shape = next(iter(slots.values()))
    if None in slots:
        return Output(name, shape, [part])
    experts = sorted(slot for slot in slots if slot is not None)
    return Output(name, (len(experts), *shape), [slots[expert][0] for expert in experts])


def _shape_after(shape: tuple[int, ...], operations: Iterable[Operation]) -> tuple[int, ...]:
    for operation in operations:
        if isinstance(operation, Transpose):
            shape = shape[::-1]
        elif isinstance(operation, RowSlice):
            rows = operation.stop - operation.start
            shape = (rows,) if len(shape) == 1 else (*shape[:-2], rows, shape[-1])
    return shape


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
