"""Replies of an encoder-decoder in a llama.cpp context: which sequences are whose, and how sources are handed over.

Sources of several replies are encoded in one batch, each for all sequences of its reply. Evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgetune.engine.native import AdapterKey, lib


@dataclass(eq=False)
class Target:
    """One reply's place in the engine."""

    source: list[int]
    adapters: AdapterKey
    room: int
    """Tokens that it may have, the start token included."""
    beams: int = 0
    """0 where nothing is searched."""
    ids: list[int] = field(default_factory=list)
    """The decoder's tokens that were evaluated, the start token first; of beams, only their number means anything."""
    first: int = 0
    """Its first sequence in the context."""
    side: int = 0
    """Which of the two sets of sequences the beams are in."""

    @property
    def width(self) -> int:
        """How many sequences it takes: beams have two sets, to be copied from the one to the other in any order."""
        return 2 * self.beams or 1


class SourceBatch:
    """Sources, each of which belongs to several sequences at once."""

    def __init__(self, sources: Sequence[tuple[Sequence[int], int, int]]) -> None:
        """`sources` are (ids, first sequence, how many sequences)."""
        lengths = [len(ids) for ids, _, _ in sources]
        count = sum(lengths)
        self._tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _, _ in sources])
        self._positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        self._counts = np.repeat(np.asarray([width for _, _, width in sources], np.int32), lengths)
        self._outputs = np.ones(count, np.int8)
        self._sequences = [np.arange(first, first + width, dtype=np.int32) for _, first, width in sources]
        pointer = lib.ctypes.POINTER(lib.ctypes.c_int32)
        own = [numbers.ctypes.data_as(pointer) for numbers in self._sequences]
        owners = np.repeat(np.arange(len(sources)), lengths)
        self._pointers = (pointer * count)(*(own[owner] for owner in owners))
        self.raw: Any = lib.llama_batch(
            n_tokens=count,
            token=self._tokens.ctypes.data_as(pointer),
            embd=None,
            pos=self._positions.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._pointers,
            logits=self._outputs.ctypes.data_as(lib.ctypes.POINTER(lib.ctypes.c_int8)),
        )
