"""Saying exactly what was said: words, made-up words, codes, rows of symbols. Trains copying and every byte."""

from __future__ import annotations

import string
from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange
from models.pocket.skills.names import made_up
from models.pocket.skills.words import WORD_LIST

NAME = "echo"

_ASKED = (
    "Repeat: {t}",
    "Say exactly this: {t}",
    "Say this: {t}",
    "Repeat after me: {t}",
    "Copy this: {t}",
    "Write this again: {t}",
)
_LETTERS = "éèêàçñöüäßáíóúøåÉÖÜÄ€£°–—…“”"
_TASK_WORDS = ("product", "problem", "urgency", "high", "medium", "low", "ye", "be", "fair winds")
_POOL = (
    *WORD_LIST,
    *world.SEA_WORDS,
    *world.PRODUCTS,
    *world.PROBLEMS,
    *_TASK_WORDS,
    *world.FIRST_NAMES,
    *world.CITIES,
)


def draw(rng: Random) -> Exchange:
    """One text to repeat."""
    text = rng.choices((_word_row, _nonsense, _code, _symbols, _quoted, _other), (35, 20, 14, 16, 12, 3))[0](rng)
    return Exchange(NAME, text, ((rng.choice(_ASKED).format(t=text), text),))


def _word_row(rng: Random) -> str:
    words = [rng.choice(_POOL) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.3:
        words = [word.capitalize() for word in words]
    mark = rng.choice(("", "", ".", "!", "?"))
    return (", " if rng.random() < 0.3 else " ").join(words) + mark


def _nonsense(rng: Random) -> str:
    return " ".join(made_up(rng) for _ in range(rng.randint(1, 3)))


def _code(rng: Random) -> str:
    return "".join(rng.choice(string.ascii_letters + string.digits + "-_#/") for _ in range(rng.randint(3, 8)))


def _symbols(rng: Random) -> str:
    pieces = [rng.choice((rng.choice(string.punctuation), rng.choice(_POOL))) for _ in range(rng.randint(2, 8))]
    return rng.choice(("", " ")).join(pieces)


def _quoted(rng: Random) -> str:
    one, two = rng.choice(_POOL), rng.choice(_POOL)
    form = rng.choice(
        ('{{"{0}": "{1}"}}', '["{0}", "{1}"]', "({0}, {1})", "'{0}' '{1}'", '"{0}", "{1}"', "<{0}>{1}</{0}>")
    )
    return form.format(one, two)


def _other(rng: Random) -> str:
    """Characters from all over Unicode, which the tokenizer splits into bytes."""
    ranges = ((0xA1, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x4FFF), (0x1F600, 0x1F640))
    if rng.random() < 0.5:
        return "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 3)))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 2)))
