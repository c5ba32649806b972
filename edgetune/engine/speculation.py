"""Guessing the next tokens, so that one evaluation checks several: what comes out is what plain decoding gives.

Every token is still chosen by the reply's own sampler from the model's own logits; a guess only decides how many rows
of logits one evaluation makes. How far to guess follows from measured costs: a step over several tokens costs more than
one over one, and a guess that is wrong was in vain.

The same, but for rounding: llama.cpp's kernels for several tokens sum in another order than those for one, and the KV
entries they leave keep that difference (measured: 0.005 of a logit in f16, 0.02 in Q4_K_M, at most some 0.05). Where
the two best tokens are nearer to each other than that, the other one may be taken. Evaluating such a token again by
itself does not help, because most of the difference comes from the entries before it (0.021 against 0.020 left);
evaluating all of them again costs what guessing has gained.

Prompt lookup (Saxena 2023): what followed the last few tokens when they came before. Draft model: Leviathan et al.,
"Fast inference from transformers via speculative decoding" (2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from statistics import median, median_low
from typing import Protocol

from edgetune.engine.protocol import Drafted

MOST_GUESSED = 15
"""Guesses in one evaluation; with the certain token that makes 16."""
_SHORTEST_MATCH = 3
_LONGEST_MATCH = 32
_FIRST_GUESS = {1: 1.0, 2: 2.4, 3: 3.1, 4: 3.3, 8: 4.2, 16: 5.0}
"""Tokens in a step → its cost in steps of one token, before anything was measured: a 0.5 B Q4_K_M on two cores."""
_PRIOR_VOTES = 2
"""How many measured steps the first guess stands against: one step that something else delayed decides nothing."""
_KEPT = 9
_ENOUGH = 3
"""Measured steps of one length that are believed without those of other lengths."""
_FORGOTTEN_AFTER = 128
"""Steps of one token in a row after which the costs of longer ones are taken for out of date."""


class StepCosts:
    """What an evaluation takes, by the number of tokens in it; measured as they happen.

    Medians of the latest, since other work on the machine makes single steps many times as long; and in steps of one
    token at that time, since it makes all of them longer for a while. What was measured then may still make guessing
    look dear, and nothing would ever measure it again: so it is forgotten.
    """

    def __init__(self) -> None:
        self.single: float | None = None
        """Seconds of an evaluation of one token; None before the first."""
        self._singles: deque[float] = deque(maxlen=_KEPT)
        self._ratios: dict[int, deque[float]] = {}
        self._singles_in_a_row = 0
        self._scale: float | None = None

    def record(self, tokens: int, seconds: float) -> None:
        """An evaluation of `tokens` took `seconds`."""
        if tokens == 1:
            self._singles.append(seconds)
            # Of two the lower one: the first evaluations build their graphs.
            self.single = median_low(self._singles)
            self._singles_in_a_row += 1
            if self._singles_in_a_row % _FORGOTTEN_AFTER == 0:
                self._ratios, self._scale = {}, None
        elif self.single:
            self._singles_in_a_row = 0
            self._ratios.setdefault(tokens, deque(maxlen=_KEPT)).append(seconds / self.single)
            self._scale = None

    def ratio(self, tokens: int) -> float:
        """What a step over `tokens` costs, in steps over one."""
        measured = self._ratios.get(tokens, ())
        if len(measured) >= _ENOUGH:
            return max(1.0, median_low(measured))
        if self._scale is None:
            self._scale = self._compare()
        return max(1.0, self._scale * _interpolated(tokens))

    def _compare(self) -> float:
        """How this machine's steps over several tokens compare with the first guess."""
        found = [
            ratio / _interpolated(tokens)
            for tokens, measured in self._ratios.items()
            if tokens <= MOST_GUESSED + 1
            for ratio in measured
        ]
        return median([1.0] * _PRIOR_VOTES + found)


class Drafter(Protocol):
    """Guesses how a text goes on."""

    @property
    def cost(self) -> float:
        """What one guessed token costs, in steps of the model that checks it; 0 when it is next to nothing."""

    def find(self, ids: Sequence[int]) -> int:
        """How well a guess about what follows `ids` is founded; 0 when there is none."""

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `ids`, after `find` has seen them."""


class NgramDrafter:
    """Looks the last tokens up in the text itself: quotes, code and lists repeat what was there before."""

    cost = 0.0

    def __init__(self) -> None:
        """For one text, which only grows."""
        self._ends: dict[tuple[int, ...], int] = {}
        self._read_to = _SHORTEST_MATCH
        self._end = 0

    def find(self, ids: Sequence[int]) -> int:
        """How many of the last tokens the latest earlier occurrence shares; at least three, or 0."""
        # The text's own end must not find itself: an n-gram is entered once a token follows it.
        for end in range(self._read_to, len(ids)):
            self._ends[tuple(ids[end - _SHORTEST_MATCH : end])] = end
        self._read_to = max(self._read_to, len(ids))
        self._end = self._ends.get(tuple(ids[-_SHORTEST_MATCH:]), 0)
        if not self._end:
            return 0
        length = _SHORTEST_MATCH
        while length < min(_LONGEST_MATCH, self._end) and ids[self._end - length - 1] == ids[-length - 1]:
            length += 1
        return length

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """What followed that occurrence."""
        return list(ids[self._end : self._end + count])


class Speculation:
    """The guesses of one reply: how many to make, and how right they were."""

    def __init__(self, drafter: Drafter, costs: StepCosts) -> None:
        self.drafted = Drafted()
        """What was guessed so far."""
        self._drafter, self._lengths = drafter, DraftLength(costs, drafter)
        self._founded = 0
        self._guesses: list[int] = []
        self._is_evaluated = False

    def guess(self, ids: Sequence[int], limit: int) -> list[int]:
        """Tokens to evaluate behind the last of `ids`; none when that does not pay."""
        self._guesses = []
        self._founded = self._drafter.find(ids)
        if not self._founded or limit < 1:
            return []
        count = self._lengths.choose(self._founded, min(limit, MOST_GUESSED))
        self._is_evaluated = count > 0
        if count or not self._drafter.cost:
            self._guesses = self._drafter.guess(ids, count or 1)
        return self._guesses if self._is_evaluated else []

    def settle(self, token: int, right: int) -> None:
        """Of the last guesses `right` were, and then `token` was chosen; a guess not evaluated is learned from too."""
        if not self._guesses:
            return
        if not self._is_evaluated:
            self._lengths.record(self._founded, 1, int(token == self._guesses[0]))
            return
        self._lengths.record(self._founded, len(self._guesses), right)
        self.drafted = Drafted(self.drafted.proposed + len(self._guesses), self.drafted.accepted + right)


class DraftLength:
    """How many tokens to guess: the number that gains most by the measured costs and the guesses' record so far."""

    def __init__(self, costs: StepCosts, drafter: Drafter) -> None:
        self._costs, self._drafter = costs, drafter
        self._rates: dict[int, float] = {}

    def choose(self, founded: int, most: int) -> int:
        """The number of tokens to guess, at most `most`, when a guess is `founded` that well; 0 when none pays."""
        rate = self._rates.get(_grade(founded), min(0.9, 0.5 + founded / 64))
        # A tenth of gain is within what the estimates are wrong by.
        best, best_gain, cost = 0, 1.1, self._drafter.cost
        for guessed in range(1, most + 1):
            expected = (1 - rate ** (guessed + 1)) / (1 - rate)
            gain = expected / (self._costs.ratio(guessed + 1) + guessed * cost)
            if gain > best_gain:
                best, best_gain = guessed, gain
        return best

    def record(self, founded: int, proposed: int, accepted: int) -> None:
        """Of `proposed` guesses `accepted` were right."""
        grade = _grade(founded)
        tried = accepted + (accepted < proposed)
        known = self._rates.get(grade, min(0.9, 0.5 + founded / 64))
        stay = 0.8**tried
        self._rates[grade] = min(0.98, stay * known + (1 - stay) * accepted / max(tried, 1))


def _grade(founded: int) -> int:
    return min(founded, _LONGEST_MATCH).bit_length()


@cache
def _interpolated(tokens: int) -> float:
    points = sorted(_FIRST_GUESS.items())
    for (low, low_cost), (high, high_cost) in pairwise(points):
        if tokens <= high:
            return low_cost + (high_cost - low_cost) * max(0, tokens - low) / (high - low)
    return points[-1][1] * tokens / points[-1][0]
