"""Yes or no, after the fact that decides it. Held out are subjects of facts, and pairs of numbers.

The fact comes first and ends in the word that the question has as well when the answer is yes: so small a model finds
a word again (it is how it copies) more easily than it compares one with what it knows.
"""

from __future__ import annotations

from random import Random

from models.pocket.exchange import Exchange, sentence
from models.pocket.skills import facts

NAME = "yesno"

_KINDS = tuple(kind for kind in facts.ALL_KINDS if kind.yes_no and kind.answer.endswith("{v}."))
_WEIGHTS = [len(kind.table) ** 0.75 for kind in _KINDS]
_FRAMES = ("{q}", "{q}", "{q}", "Tell me: {q}", "Yes or no: {q}", "I wonder: {q}", "Please tell me: {q}")


def draw(rng: Random) -> Exchange:
    """One claim to confirm or to correct."""
    return _number(rng) if rng.random() < 0.15 else _fact(rng)


def _fact(rng: Random) -> Exchange:
    kind = rng.choices(_KINDS, _WEIGHTS)[0]
    fact = rng.choice(kind.table)
    claimed = fact["v"] if rng.random() < 0.5 else rng.choice(kind.table)["v"]
    question = rng.choice(_FRAMES).format(q=kind.yes_no.format(**{**fact, "v": claimed}))
    truth = sentence(kind.answer.format(**fact)).rstrip(".")
    answer = _verdict(truth, "" if claimed == fact["v"] else kind.claim.format(v=claimed))
    # A subject is asked about in training or here, never both: what it is asked with would give the answer away.
    return Exchange(NAME, f"{kind.name}|{fact['s']}", ((sentence(question), answer),), casual=True)


def _number(rng: Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    word = rng.choice(("bigger", "smaller"))
    right = (a > b) == (word == "bigger")
    real = word if right else {"bigger": "smaller", "smaller": "bigger"}[word]
    question = rng.choice(("Is {a} {w} than {b}?", "Is the number {a} {w} than {b}?")).format(a=a, b=b, w=word)
    return Exchange(NAME, f"{a} {b}", ((question, _verdict(f"{a} is {real}", "" if right else word)),), casual=True)


def _verdict(truth: str, denied: str) -> str:
    return f"{truth}, not {denied}: no." if denied else f"{truth}: yes."
