"""How often the training sequences of each file come in an epoch: `-d FILE:WEIGHT`.

A weight of 2 is every sequence twice an epoch, 0.5 half of them: the next half each epoch, so that all come in turn.
What an epoch holds is a function of (seed, epoch), so that a resumed run needs no more than its step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Dataset, Split
from edgetune.errors import UnsupportedError, UsageError

Indices = NDArray[np.int64]

_STREAM = 0x6D6978
"""Keeps these random numbers apart from those of an epoch's order."""


@dataclass(frozen=True)
class Part:
    """The sequences of one weight."""

    name: str
    """The path it was given for; empty where none was."""
    weight: float
    indices: Indices
    """Numbers of its sequences among all of them."""

    @property
    def size(self) -> int:
        """Sequences of it in an epoch."""
        whole, rest = self._shares()
        return whole * len(self.indices) + rest

    def epoch(self, seed: int, epoch: int) -> Indices:
        """Its sequences in `epoch`, those that come twice there twice."""
        whole, rest = self._shares()
        kept = np.tile(self.indices, whole)
        if not rest:
            return kept
        order = np.random.default_rng([seed, _STREAM, len(self.indices)]).permutation(self.indices)
        return np.concatenate([kept, order[(epoch * rest + np.arange(rest)) % len(order)]])

    def _shares(self) -> tuple[int, int]:
        whole = int(self.weight)
        rest = round((self.weight - whole) * len(self.indices))
        return whole, rest if whole else max(1, rest)


@dataclass(frozen=True)
class Mix:
    """All parts of an epoch."""

    parts: Sequence[Part]

    @classmethod
    def even(cls, sequences: int) -> Mix:
        """Every sequence once."""
        return cls((Part("", 1.0, np.arange(sequences)),))

    @property
    def size(self) -> int:
        """Sequences in an epoch."""
        return sum(part.size for part in self.parts)

    def epoch(self, seed: int, epoch: int) -> Indices:
        """The sequences of `epoch`, in the parts' order."""
        return np.concatenate([part.epoch(seed, epoch) for part in self.parts])

    def record(self) -> list[dict[str, Any]]:
        """As JSON-ready values; empty where nothing is weighted."""
        if all(part.weight == 1 for part in self.parts):
            return []
        return [
            {"data": part.name, "weight": part.weight, "sequences": len(part.indices), "in_an_epoch": part.size}
            for part in self.parts
        ]


def mix(weights: Mapping[str, float], dataset: Dataset, train: Split[Any]) -> Mix:
    """The mix of `train`, whose files were given as the paths in `weights`.

    Raises `UsageError` for a weight that no training row has, `UnsupportedError` for a task that does not say which
    rows its sequences are of.
    """
    if all(weight == 1 for weight in weights.values()):
        return Mix.even(len(train.sequences))
    owners = [_given(Path(place.rpartition(", ")[0]), weights) for place, _ in dataset.examples["train"]]
    if train.rows_of is None or None in owners:
        raise UnsupportedError(
            f"The task {dataset.task} does not say which row a sequence is of, so that files cannot be weighted.",
            hint="Leave out the weights behind the paths.",
        )
    of_sequences = np.array([owners[row] for row in train.rows_of], dtype=object)
    parts = [Part(name, weight, np.flatnonzero(of_sequences == name)) for name, weight in weights.items()]
    if empty := next((part for part in parts if part.weight != 1 and not len(part.indices)), None):
        raise UsageError(
            f"{empty.name} has the weight {empty.weight:g}, but no training rows.",
            hint="Weights are for training data: leave it out there.",
        )
    return Mix(tuple(part for part in parts if len(part.indices)))


def _given(path: Path, weights: Mapping[str, float]) -> str | None:
    """The path as given of which `path` is a file: itself, or the nearest directory above it."""
    known = {Path(name): name for name in weights}
    return next((known[place] for place in (path, *path.parents) if place in known), None)
