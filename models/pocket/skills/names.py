"""Names and words made of syllables, so that copying has to be learned rather than a list of names."""

from __future__ import annotations

from random import Random

from models.pocket import world

_STARTS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
    "",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_ENDS = ("", "n", "r", "l", "s", "x", "nd", "rt", "m", "k")


def made_up(rng: Random) -> str:
    """A word of two or three syllables that (nearly always) means nothing."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)


def any_name(rng: Random) -> str:
    """A first name: a usual one, or one that nobody has."""
    return rng.choice(world.FIRST_NAMES) if rng.random() < 0.6 else made_up(rng).capitalize()


def any_place(rng: Random) -> str:
    """A city: a real one, or one that is nowhere."""
    return rng.choice(world.CITIES) if rng.random() < 0.7 else made_up(rng).capitalize()
