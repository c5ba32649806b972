"""Beam search over any decoder that gives logits: scores, which beams go on, which are finished, and when to stop.

Pure arithmetic on rows of log-probabilities, the same for every engine, with the rules of transformers 5: of
(1 + end tokens) × beams candidates the best that have not ended go on; the ended ones among the best `beams` compete by
their log-probability divided by length ** length_penalty. Evaluates nothing and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import UsageError

_NEVER = np.float32(-1e9)
"""The score of a beam that is none yet, as in transformers."""
MOST_BEAMS = 64


@dataclass(frozen=True)
class BeamSettings:
    """How a beam search goes; names and defaults are transformers'."""

    num_beams: int = 1
    """How many continuations are followed side by side; 1 is no beam search."""
    length_penalty: float = 1.0
    """A text's log-probability is divided by its length to this power: above 0 favours longer texts."""
    early_stopping: bool | Literal["never"] = False
    """True stops with as many finished texts as beams; False when a better one is unlikely; "never" when impossible."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_beams <= MOST_BEAMS:
            raise UsageError(f"num_beams is {self.num_beams}; it has to be between 1 and {MOST_BEAMS}.")


@dataclass(frozen=True)
class Hypothesis:
    """A text the search found, as token ids."""

    ids: tuple[int, ...]
    """The end token included, where it has one."""
    score: float
    ended: bool
    """Whether the model ended it, and not the limit."""


class BeamSearch:
    """One running search."""

    def __init__(self, settings: BeamSettings, *, end_ids: frozenset[int], max_new: int) -> None:
        """Texts end with one of `end_ids`, or at `max_new` tokens."""
        self._settings, self._end_ids, self._max_new = settings, end_ids, max_new
        beams = settings.num_beams
        self.running: list[tuple[int, ...]] = [()] * beams
        """The texts that go on, best first; before the first step all of them are the same empty one."""
        self._scores = np.full(beams, _NEVER, np.float32)
        self._scores[0] = 0
        self._finished: list[Hypothesis | None] = [None] * beams
        self.is_done = max_new <= 0

    def step(self, log_probs: NDArray[np.float32]) -> tuple[list[int], list[int]]:
        """Take one token further; `log_probs` is (beams, vocabulary), a row for each of `running`.

        Returns for every beam that goes on which one it continues, and with which token.
        """
        totals = (log_probs + self._scores[:, None]).astype(np.float32).ravel()
        beams, vocabulary = log_probs.shape
        best = _largest(totals, max(2, 1 + len(self._end_ids)) * beams)
        scores = totals[best]
        parents, tokens = best // vocabulary, best % vocabulary
        texts = [(*self.running[parent], int(token)) for parent, token in zip(parents, tokens, strict=True)]
        length = len(texts[0])
        ended = np.isin(tokens, list(self._end_ids))
        stops = ended | (length >= self._max_new)
        self._keep_finished(texts, scores, ended, stops, length)
        going = np.argsort(-(scores + stops.astype(np.float32) * _NEVER), kind="stable")[:beams]
        self.running = [texts[place] for place in going]
        self._scores = scores[going]
        self.is_done = bool(stops.all()) or not self._can_improve(length)
        return parents[going].tolist(), tokens[going].tolist()

    @property
    def best(self) -> Hypothesis:
        """The best text so far; the likeliest running one where none is finished."""
        return self._finished[0] or Hypothesis(self.running[0], float(self._scores[0]), False)

    def _keep_finished(
        self,
        texts: Sequence[tuple[int, ...]],
        scores: NDArray[np.float32],
        ended: NDArray[np.bool_],
        stops: NDArray[np.bool_],
        length: int,
    ) -> None:
        # Only the best `beams` candidates may finish; the others are there so that enough of them can go on.
        beams = self._settings.num_beams
        values = scores[:beams] / np.float32(length**self._settings.length_penalty)
        new = [
            Hypothesis(texts[place], float(values[place]), bool(ended[place])) for place in range(beams) if stops[place]
        ]
        known = [one for one in self._finished if one]
        merged = sorted([*known, *new], key=lambda one: -one.score)[:beams]
        self._finished = [*merged, *[None] * (beams - len(merged))]

    def _can_improve(self, length: int) -> bool:
        settings = self._settings
        finished = [one.score for one in self._finished if one]
        if len(finished) < settings.num_beams:
            return True
        if settings.early_stopping is True:
            return False
        longest = settings.early_stopping == "never" and settings.length_penalty > 0
        reach = self._max_new if longest else length
        return bool(self._scores[0] / np.float32(reach**settings.length_penalty) > min(finished))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    values: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return values


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Where the `count` largest values are, largest first; of equal ones the first."""
    count = min(count, len(values))
    places = np.sort(np.argpartition(-values, count - 1)[:count])
    order: NDArray[np.int64] = places[np.argsort(-values[places], kind="stable")]
    return order
