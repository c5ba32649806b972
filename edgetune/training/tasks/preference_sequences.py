"""What preference tuning learns from, as token ids: two replies behind a prompt, or one reply and whether it is wanted.

A reply is what training for chat learns of the same row: rendered by the chat template, behind the ids that chat makes
of its prompt. Nothing here knows a loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetune.data import Masker, Tokenized
from edgetune.data.dataset import Skipped
from edgetune.data.messages import RowError
from edgetune.data.preferences import Judged, Preference, Prompt, Reply
from edgetune.training.tasks.preference_logps import Replies

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PairSequence:
    """Two replies behind one prompt."""

    chosen: Tokenized
    rejected: Tokenized
    example: Preference

    @property
    def ids(self) -> NDArray[np.int32]:
        """Both, one after the other: what the pair costs."""
        return np.concatenate([self.chosen.ids, self.rejected.ids])

    @property
    def learned(self) -> NDArray[np.bool_]:
        """Both replies."""
        return np.concatenate([self.chosen.learned, self.rejected.learned])

    @property
    def learned_count(self) -> int:
        """Tokens of both replies."""
        return self.chosen.learned_count + self.rejected.learned_count


@dataclass(frozen=True)
class JudgedSequence:
    """A reply behind its prompt, and another prompt's reply behind the same one."""

    whole: Tokenized
    mismatched: Tokenized
    example: Judged

    @property
    def ids(self) -> NDArray[np.int32]:
        """Those of the reply with its prompt."""
        return self.whole.ids

    @property
    def learned(self) -> NDArray[np.bool_]:
        """The reply."""
        return self.whole.learned

    @property
    def learned_count(self) -> int:
        """Tokens of the reply."""
        return self.whole.learned_count


@dataclass(frozen=True)
class PreferenceBatch:
    """What one pass takes: pairs (all chosen replies, then all rejected ones), or judged replies."""

    replies: Replies
    size: int
    """Pairs, or judged replies: what the loss is a mean over."""
    mismatched: Replies | None = None
    good: torch.Tensor | None = None
    """(replies,), where they are judged."""

    @property
    def tokens(self) -> int:
        """Without padding; those behind which the divergence is estimated do not count."""
        return self.replies.rows.tokens

    @property
    def learned_tokens(self) -> int:
        """Tokens of the replies."""
        return self.replies.rows.learned_tokens

    @property
    def denominator(self) -> float:
        """The mean is over pairs, or judged replies."""
        return float(self.size)


@dataclass
class SequenceMaker:
    """Makes sequences of replies to one prompt, and counts what is lost."""

    masker: Masker
    skipped: Skipped
    truncated: int = 0
    dropped: int = 0

    def make(self, place: str, prompt: Prompt, replies: tuple[Reply, Reply]) -> tuple[Tokenized, Tokenized] | None:
        """Both replies behind `prompt`, cut; None when a bad row is skipped or nothing of a reply is left."""
        try:
            whole = [self._one(prompt, reply) for reply in replies]
        except RowError as error:
            self.skipped.add(place, str(error))
            return None
        length = self.masker.max_length
        self.truncated += any(len(sequence.ids) > length for sequence in whole)
        first, second = (sequence.cut(length) for sequence in whole)
        if first.learned[1:].any() and second.learned[1:].any():
            return first, second
        self.dropped += 1
        return None

    def _one(self, prompt: Prompt, reply: Reply) -> Tokenized:
        made = self.masker.sequences(prompt.answered(reply))
        if len(made) != 1:
            raise RowError("a reply that the chat template writes in one go", "one it rewrites on the way")
        return made[0]
