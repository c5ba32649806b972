"""The next-token distribution as numbers: before sampling, and what a chain of samplers leaves of it.

Works on llama.cpp's own logits, row by row, so that no context has to keep logits of every position.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.native import lib

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_ROWS = 64
"""Logits whose largest one is looked at first: a partial sort of all of them would take as long as sampling does."""
_SMALL = 4096
"""Up to so many, the simplest way is the fastest."""


class CandidateArray:
    """The array that native samplers filter, sort and choose from, with room for a vocabulary."""

    def __init__(self, size: int) -> None:
        self._ids = np.arange(size, dtype=np.int32)
        self._data = np.zeros(size, _TOKEN_DATA)
        self._logits, self._tokens = self._data["logit"], self._data["id"]
        self._start: Any = self._data.ctypes.data_as(lib.llama_token_data_p)
        self.raw: Any = lib.llama_token_data_array(size=size, selected=-1, sorted=False)
        """What `llama_sampler_apply` takes by reference."""

    def load(self, logits: NDArray[np.float32]) -> None:
        """Begin with every token and its logit."""
        self._tokens[:], self._logits[:] = self._ids, logits
        self.raw.data = self._start
        self.raw.size, self.raw.selected, self.raw.sorted = len(self._ids), -1, False

    @property
    def selected(self) -> int:
        """The token chosen."""
        return int(self.raw.data[self.raw.selected].id)

    def kept(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Tokens that are left and their logits; valid until the next `load`."""
        address = ctypes.addressof(self.raw.data.contents)
        memory = (ctypes.c_char * (self.raw.size * _TOKEN_DATA.itemsize)).from_address(address)
        data = np.frombuffer(memory, _TOKEN_DATA)
        return data["id"], data["logit"]


def read_logits(context: Any, row: int, size: int) -> NDArray[np.float32]:
    """The logits of output `row` of the last evaluation, (vocabulary,); valid until the next one."""
    logits: NDArray[np.float32] = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), (size,))
    return logits


def likeliest_and(token: int, logits: NDArray[np.float32], count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` likeliest tokens, best first, and behind them `token`; with the softmax over all `logits` at them."""
    likely = most_likely(logits, count)
    tokens = np.empty(len(likely) + 1, np.int32)
    tokens[:-1], tokens[-1] = likely, token
    best = logits[likely[0]]
    chances: NDArray[np.float32] = np.exp(logits[tokens] - best) / np.exp(logits - best).sum()
    return tokens, chances


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The `count` tokens with the largest logits, best first."""
    size = len(logits)
    count = min(count, size)
    if size <= _SMALL or 2 * count >= size // _ROWS:
        likely = logits.argpartition(-count)[-count:]
    else:
        # Every column holds one as large as its maximum: the `count` largest are in the `count` columns with the
        # largest maxima, but for ties. One pass, whatever the distribution looks like.
        columns = size // _ROWS
        maxima = logits[: _ROWS * columns].reshape(_ROWS, columns).max(axis=0)
        best = maxima.argpartition(-count)[-count:]
        places = (best[:, None] + columns * np.arange(_ROWS)).ravel()
        places = np.append(places, np.arange(_ROWS * columns, size))
        likely = places[logits[places].argpartition(-count)[-count:]]
    order: NDArray[np.intp] = likely[(-logits[likely]).argsort(kind="stable")]
    return order


def sampled_shares(
    kept: tuple[NDArray[np.int32], NDArray[np.float32]], tokens: NDArray[np.int32]
) -> NDArray[np.float32]:
    """The chance that the samplers leave each of `tokens`."""
    ids, logits = kept
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    if len(ids) <= _SMALL:
        share = dict(zip(ids.tolist(), weights.tolist(), strict=True)).get
        return np.array([share(token, 0.0) for token in tokens.tolist()], np.float32)
    order = ids.argsort()
    found = order[np.searchsorted(ids, tokens, sorter=order) % len(ids)]
    shares: NDArray[np.float32] = np.where(ids[found] == tokens, weights[found], np.float32(0))
    return shares
