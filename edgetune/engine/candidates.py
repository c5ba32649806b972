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


class CandidateArray:
    """The array that native samplers filter, sort and choose from, with room for a vocabulary."""

    def __init__(self, size: int) -> None:
        self._ids = np.arange(size, dtype=np.int32)
        self._data = np.zeros(size, _TOKEN_DATA)
        self.raw: Any = lib.llama_token_data_array(size=size, selected=-1, sorted=False)
        """What `llama_sampler_apply` takes by reference."""

    def load(self, logits: NDArray[np.float32]) -> None:
        """Begin with every token and its logit."""
        self._data["id"], self._data["logit"] = self._ids, logits
        self.raw.data = self._data.ctypes.data_as(lib.llama_token_data_p)
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


def probabilities_of(logits: NDArray[np.float32], tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """The softmax over all `logits`, at `tokens` alone."""
    best = logits.max()
    values: NDArray[np.float32] = np.exp(logits[tokens] - best) / np.exp(logits - best).sum()
    return values


def most_likely(logits: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """The `count` tokens with the largest logits, best first."""
    count = min(count, len(logits))
    columns = len(logits) // _ROWS
    if 2 * count < columns:
        # Every column holds one as large as its maximum: the `count` largest are in the `count` columns with the
        # largest maxima, but for ties. One pass, whatever the distribution looks like.
        maxima = logits[: _ROWS * columns].reshape(_ROWS, columns).max(axis=0)
        best = np.argpartition(maxima, -count)[-count:]
        places = (best[:, None] + columns * np.arange(_ROWS)).ravel()
        places = np.append(places, np.arange(_ROWS * columns, len(logits)))
    else:
        places = np.arange(len(logits))
    likely = places[np.argpartition(logits[places], -count)[-count:]]
    order: NDArray[np.int32] = likely[np.argsort(-logits[likely], kind="stable")].astype(np.int32)
    return order


def sampled_shares(kept: tuple[NDArray[np.int32], NDArray[np.float32]], tokens: NDArray[np.int32]) -> list[float]:
    """The chance that the samplers leave each of `tokens`."""
    ids, logits = kept
    weights = np.exp(logits - logits.max())
    total = float(weights.sum())
    places = {int(token): place for place, token in enumerate(ids)} if len(ids) < 4096 else None
    if places is None:
        order = np.argsort(ids)
        found = order[np.searchsorted(ids, tokens, sorter=order) % len(ids)]
        places = {int(ids[place]): int(place) for place in found}
    return [float(weights[places[token]]) / total if token in places else 0.0 for token in tokens.tolist()]
