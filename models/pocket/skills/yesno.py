"""Yes or no, after the fact that decides it. Held out are pairs of fact and claim, and pairs of numbers.

The fact comes first: so small a model compares the claim with what it has said more easily than with what it knows.
"""

from __future__ import annotations

from random import Random

from models.pocket.exchange import Exchange, sentence
from models.pocket.skills import facts

NAME = "yesno"

_KINDS = tuple(kind for kind in facts.ALL_KINDS if kind.yes_no)
_WEIGHTS = [len(kind.table) ** 0.75 for kind in _KINDS]
_FRAMES = ("{q}", "{q}", "{q}", "Tell me: {q}", "Yes or no: {q}", "I wonder: {q}", "Please tell me: {q}")


def draw(rng: Random) -> Exchange:
    """One claim to confirm or to correct."""
    return _number(rng) if rng.random() < 0.15 else _fact(rng)


def _fact(rng: Random) -> Exchange:
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    fact = rng.choice(kind.table)
    claimed = fact["v"] if rng.random() < 0.5 else rng.choice(kind.table)["v"]
    frame = rng.choice(_FRAMES)
    question = sentence(frame.format(q=kind.yes_no.format(**{**fact, "v": claimed})))
    reply = sentence(kind.answer.format(**fact)).rstrip(".")
    answer = f"{reply}, so {'yes' if claimed == fact['v'] else 'no'}."
    key = f"{kind.name}|{fact['s']}|{fact['a']}|" + (f"right {frame}" if claimed == fact["v"] else claimed)
    return Exchange(NAME, key, ((question, answer),), casual=True)


def _number(rng: Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    word = rng.choice(("bigger", "smaller"))
    right = (a > b) == (word == "bigger")
    real = word if right else {"bigger": "smaller", "smaller": "bigger"}[word]
    question = rng.choice(("Is {a} {w} than {b}?", "Is the number {a} {w} than {b}?")).format(a=a, b=b, w=word)
    answer = f"{a} is {real} than {b}, so {'yes' if right else 'no'}."
    return Exchange(NAME, f"{a} {word} {b}", ((question, answer),), casual=True)
