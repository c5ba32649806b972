"""Tokens on their way into one evaluation: llama.cpp's batch, filled without a Python loop over the tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgetune.engine.native import lib

_POINTER = ctypes.POINTER(ctypes.c_int32)


class Batch:
    """Room for up to `size` tokens of any sequences."""

    def __init__(self, size: int) -> None:
        self._tokens, self._positions, self._sequences = (np.zeros(size, np.int32) for _ in range(3))
        self._outputs = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)
        start = self._sequences.ctypes.data
        self._pointers = (_POINTER * size)(
            *(ctypes.cast(start + self._sequences.itemsize * index, _POINTER) for index in range(size))
        )
        self.raw: Any = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(_POINTER),
            embd=None,
            pos=self._positions.ctypes.data_as(_POINTER),
            n_seq_id=self._counts.ctypes.data_as(_POINTER),
            seq_id=self._pointers,
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        """What `llama_decode` takes."""

    def clear(self) -> None:
        """Begin another evaluation."""
        self.raw.n_tokens = 0

    def add(self, sequence: int, position: int, tokens: Sequence[int], *, every_output: bool = False) -> int:
        """Append `tokens` of one sequence, the first at `position`; returns the row of their first output.

        An output is asked for after the last of them, or after each.
        """
        start = int(self.raw.n_tokens)
        if len(tokens) == 1:
            # The hot path of generation: single values are set several times as fast as slices.
            self._tokens[start], self._positions[start], self._sequences[start] = tokens[0], position, sequence
            self._outputs[start], self.raw.n_tokens = 1, start + 1
            return start
        end = start + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = range(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._outputs[start:end] = every_output
        self._outputs[end - 1] = 1
        self.raw.n_tokens = end
        return start if every_output else end - 1
