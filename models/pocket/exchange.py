"""What a skill makes, and the rule that splits everything into training and held-out.

An exchange is a few turns with a key. The key names what is asked (the fact and the phrasing, the two summands, …);
its hash alone decides the side, so no held-out question can turn up in training, whatever the random seed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

HELD_OUT_SHARE = 0.12
"""Share of the keys of every skill that training never sees."""


@dataclass(frozen=True)
class Exchange:
    """User and assistant in turns; the last reply is the one that is scored."""

    skill: str
    key: str
    """What is asked, without the random styling of the text."""
    turns: tuple[tuple[str, str], ...]
    """(user, assistant) pairs."""
    also: tuple[str, ...] = ()
    """`full_key` of other questions that its earlier turns ask and answer."""
    opens: bool = False
    """Whether it is only right at the start of a conversation."""
    casual: bool = False
    """Whether the user's text may lose its capitals and its question mark without changing the reply."""

    @property
    def full_key(self) -> str:
        """The key, unique over all skills."""
        return f"{self.skill}|{self.key}"


def is_held_out(exchange: Exchange) -> bool:
    """Whether `exchange` belongs to the held-out side."""
    return _is_held_out(exchange.full_key)


def is_trainable(exchange: Exchange) -> bool:
    """Whether nothing that `exchange` asks belongs to the held-out side."""
    return not any(map(_is_held_out, (exchange.full_key, *exchange.also)))


def _is_held_out(full_key: str) -> bool:
    return zlib.crc32(full_key.encode()) % 1000 < HELD_OUT_SHARE * 1000


def fill(rng: Random, templates: Sequence[str], **fields: object) -> tuple[int, str]:
    """Pick one of `templates` and fill it: (its number, the text)."""
    number = rng.randrange(len(templates))
    return number, templates[number].format(**fields)


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def article(noun: str) -> str:
    """`noun` with "a" or "an" before it."""
    return ("an " if re.match("[aeiou]", noun, re.IGNORECASE) else "a ") + noun


def join_words(words: Sequence[str]) -> str:
    """Words as an English list: "a, b and c"."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
