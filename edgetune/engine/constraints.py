"""What a model's own generation settings demand of its texts, beside the choice of tokens: transformers' processors.

Numbers only; names are those of generation_config.json. Sampling parameters are `sampling`'s, beams `beam`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NOT_HONOURED = {
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
}
"""Settings that change what transformers would say and are not followed here, with the values that mean nothing."""


@dataclass(frozen=True)
class Constraints:
    """Demands on every text; the defaults demand nothing."""

    forced_bos: int | None = None
    """The first token."""
    forced_eos: tuple[int, ...] = ()
    """The last token, where the limit ends the text."""
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    """Tokens, what the decoder begins with among them."""
    min_new_tokens: int = 0
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    """As `suppress`, for the first token (after a forced one)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that must not be completed."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Constraints:
        """From the values of a generation_config.json."""
        return cls(
            forced_bos=config.get("forced_bos_token_id"),
            forced_eos=_ids(config.get("forced_eos_token_id")),
            repetition_penalty=float(config.get("repetition_penalty") or 1.0),
            no_repeat_ngram_size=int(config.get("no_repeat_ngram_size") or 0),
            min_length=int(config.get("min_length") or 0),
            min_new_tokens=int(config.get("min_new_tokens") or 0),
            suppress=_ids(config.get("suppress_tokens")),
            begin_suppress=_ids(config.get("begin_suppress_tokens")),
            bad_words=_runs(config.get("bad_words_ids")),
        )

    @property
    def demands_nothing(self) -> bool:
        """Whether scores stay as they are."""
        return self == Constraints()

    def apply(
        self,
        scores: NDArray[np.float32],
        text: Sequence[int],
        *,
        start: Sequence[int],
        end_ids: frozenset[int],
        max_new: int,
    ) -> NDArray[np.float32]:
        """`scores`, (vocabulary,), of the token after `start` and `text`, of which `max_new` may follow `start`."""
        if self.demands_nothing:
            return scores
        scores = scores.copy()
        before = [*start, *text]
        if self.repetition_penalty != 1.0:
            seen = np.unique(np.asarray(before, np.int64))
            values = scores[seen]
            scores[seen] = np.where(values < 0, values * self.repetition_penalty, values / self.repetition_penalty)
        if self.no_repeat_ngram_size:
            scores[_completions(before, self.no_repeat_ngram_size)] = -np.inf
        scores[[run[-1] for run in self.bad_words if _is_forbidden(run, before, end_ids)]] = -np.inf
        if len(before) < self.min_length or len(text) < self.min_new_tokens:
            scores[list(end_ids)] = -np.inf
        if self.forced_bos is not None and not text:
            scores = _only(scores, (self.forced_bos,))
        if self.forced_eos and len(text) == max_new - 1:
            scores = _only(scores, self.forced_eos)
        scores[list(self.suppress)] = -np.inf
        if len(text) == (1 if self.forced_bos is not None and len(start) == 1 else 0):
            scores[list(self.begin_suppress)] = -np.inf
        return scores


def not_honoured(config: Mapping[str, Any]) -> list[str]:
    """The settings of a generation_config.json that are not followed here although they mean something."""
    return [name for name, idle in _NOT_HONOURED.items() if config.get(name) and config[name] not in idle]


def _only(scores: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
    forced = np.full_like(scores, -np.inf)
    forced[list(tokens)] = 0
    return forced


def _completions(before: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat a run of `size` tokens."""
    if len(before) + 1 < size:
        return []
    last = tuple(before[len(before) - size + 1 :])
    return [before[at + size - 1] for at in range(len(before) - size + 1) if tuple(before[at : at + size - 1]) == last]


def _is_forbidden(run: tuple[int, ...], before: Sequence[int], end_ids: frozenset[int]) -> bool:
    """Whether the last token of `run` would complete it; a text may always end."""
    if len(run) == 1:
        return run[0] not in end_ids
    return tuple(before[max(0, len(before) - len(run) + 1) :]) == run[:-1]


def _runs(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(run for one in value if (run := _ids(one))) if isinstance(value, list | tuple) else ()


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(int(token) for token in value) if isinstance(value, list | tuple) else ()
