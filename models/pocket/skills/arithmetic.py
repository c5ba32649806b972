"""Arithmetic: sums and differences of numbers up to 50, the times table, small word problems, which number is bigger.

Held out are pairs of operands, in every phrasing; in the times table one order of a pair, whose mirror is learned.
"""

from __future__ import annotations

from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, fill

NAME = "arithmetic"

_PLUS = (
    "What is {a} + {b}?", "{a} + {b}", "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?", "What's {a} + {b}?", "What is the sum of {a} and {b}?", "{a}+{b}",
    "Please add {a} and {b}.",
)  # fmt: skip
_MINUS = (
    "What is {a} - {b}?", "{a} - {b}", "What is {a} minus {b}?", "Subtract {b} from {a}.", "{a} - {b} = ?",
    "Calculate {a} - {b}.", "How much is {a} minus {b}?", "What's {a} - {b}?", "Take {b} away from {a}.", "{a}-{b}",
)  # fmt: skip
_TIMES = (
    "What is {a} x {b}?", "{a} x {b}", "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b}", "{a} x {b} = ?",
    "How much is {a} times {b}?", "What's {a} * {b}?", "Calculate {a} x {b}.", "What is {a} multiplied by {b}?",
)  # fmt: skip
_MORE = (
    ("{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", "{name} has {c} {things}."),
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "{name} has {c} {things}."),
    ("There are {a} {things} in a box. {name} adds {b}. How many {things} are in the box?", "There are {c} {things}."),
)
_LESS = (
    ("{name} has {a} {things} and gives away {b}. How many {things} does {name} have?", "{name} has {c} {things}."),
    ("{name} has {a} {things} and loses {b}. How many {things} does {name} have now?", "{name} has {c} {things}."),
    ("There are {a} {things} in a box. {name} takes {b}. How many {things} are in the box?", "There are {c} {things}."),
)
_BIGGER = (
    "Which is bigger, {a} or {b}?", "Which number is larger: {a} or {b}?", "Is {a} or {b} bigger?",
    "What is more, {a} or {b}?",
    "Tell me the bigger number: {a} or {b}.",
)  # fmt: skip
_SMALLER = (
    "Which is smaller, {a} or {b}?", "Which number is lower: {a} or {b}?", "Is {a} or {b} smaller?",
    "What is less, {a} or {b}?",
    "Tell me the smaller number: {a} or {b}.",
)  # fmt: skip
_COUNTED = tuple(f"{thing}s" for thing in ("book", "ball", "apple", "coin", "egg", "key", "cup", "stone", "pen", "hat"))


def draw(rng: Random) -> Exchange:
    """One calculation."""
    return rng.choices((_sum_or_difference, _product, _story, _compare), (68, 12, 12, 8))[0](rng)


def draw_sum(rng: Random) -> tuple[Exchange, int]:
    """A sum or a difference and its result, for what follows on from it."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.55:
        return _sum(rng, a, b), a + b
    return _difference(rng, max(a, b), min(a, b)), max(a, b) - min(a, b)


def _sum_or_difference(rng: Random) -> Exchange:
    return draw_sum(rng)[0]


def _number(rng: Random) -> int:
    return rng.randrange(10) if rng.random() < 0.2 else rng.randrange(51)


def _sum(rng: Random, a: int, b: int) -> Exchange:
    return Exchange(NAME, f"{a}+{b}", ((fill(rng, _PLUS, a=a, b=b)[1], f"{a} + {b} = {a + b}."),), casual=True)


def _difference(rng: Random, a: int, b: int) -> Exchange:
    return Exchange(NAME, f"{a}-{b}", ((fill(rng, _MINUS, a=a, b=b)[1], f"{a} - {b} = {a - b}."),), casual=True)


def _product(rng: Random) -> Exchange:
    a, b = rng.randrange(11), rng.randrange(11)
    number, question = fill(rng, _TIMES, a=a, b=b)
    # A table entry cannot be guessed: hold out one order of unequal operands, or else single phrasings.
    key = f"{a}x{b}" if a > b else f"{a}x{b} in words {number}"
    return Exchange(NAME, key, ((question, f"{a} x {b} = {a * b}."),), casual=True)


def _story(rng: Random) -> Exchange:
    more = rng.random() < 0.5
    a, b = rng.randrange(3, 16), rng.randrange(2, 10)
    a = a if more or a > b + 1 else a + b
    question, answer = rng.choice(_MORE if more else _LESS)
    fields = {"name": rng.choice(world.FIRST_NAMES), "things": rng.choice(_COUNTED), "a": a, "b": b}
    turn = (question.format(**fields), answer.format(c=a + b if more else a - b, **fields))
    return Exchange(NAME, f"story {more} {a} {b}", (turn,))


def _compare(rng: Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    bigger = rng.random() < 0.5
    question = fill(rng, _BIGGER if bigger else _SMALLER, a=a, b=b)[1]
    answer = f"{max(a, b)} is bigger." if bigger else f"{min(a, b)} is smaller."
    return Exchange(NAME, f"compare {a} {b}", ((question, answer),), casual=True)
