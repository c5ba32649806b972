"""Work with lists of words and numbers: sort, count, reverse, first and last. Held out are lists."""

from __future__ import annotations

from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange

NAME = "words"

WORD_LIST = tuple(sorted({*world.ANIMALS, *world.THINGS, *world.FOODS, *world.ADJECTIVES, *world.PLACES}))
_SORTED = tuple(sorted({*world.ANIMALS, *world.FOODS, *world.THINGS}))
"""The words whose order has to be known."""

_SORT_WORDS = (
    "Sort these words: {l}", "Sort alphabetically: {l}", "Put these words in order: {l}",
    "Bring these words into alphabetical order: {l}",
    "Order these words from A to Z: {l}", "Sort the words {l}.",
)  # fmt: skip
_SORT_NUMBERS = (
    "Sort these numbers: {l}", "Sort: {l}", "Put these numbers in order: {l}", "Order these numbers: {l}",
    "Sort the numbers {l}.", "Bring these numbers into order: {l}",
)  # fmt: skip
_COUNT = (
    "How many words are in this list: {l}", "Count these words: {l}", "How many words are these: {l}",
    "Count the words: {l}",
    "How many words do you see: {l}",
)  # fmt: skip
_REVERSE = (
    "Reverse this list: {l}",
    "Say these words backwards: {l}",
    "Put this list in reverse order: {l}",
    "Turn this list around: {l}",
)
_FIRST = ("What is the first word of this list: {l}", "Give me the first word: {l}", "Which word comes first: {l}")
_LAST = ("What is the last word of this list: {l}", "Give me the last word: {l}", "Which word comes last: {l}")
_HAS = ("Is the word {w} in this list: {l}", "Does this list have the word {w}: {l}", "Is {w} one of these words: {l}")


def draw(rng: Random) -> Exchange:
    """One list and one thing to do with it."""
    return rng.choices((_sort_words, _sort_numbers, _count, _reverse, _ends, _has), (26, 24, 16, 12, 14, 8))[0](rng)


def _words(rng: Random, low: int, high: int, of: tuple[str, ...] = WORD_LIST) -> list[str]:
    return rng.sample(of, rng.randint(low, high))


def _listed(rng: Random, items: list[str]) -> str:
    return (" " if rng.random() < 0.25 else ", ").join(items)


def _exchange(name: str, items: list[str], question: str, answer: str) -> Exchange:
    return Exchange(NAME, f"{name} {' '.join(items)}", ((question, answer),))


def _sort_words(rng: Random) -> Exchange:
    items = _words(rng, 2, 3, _SORTED)
    return _exchange("sort", items, rng.choice(_SORT_WORDS).format(l=_listed(rng, items)), ", ".join(sorted(items)))


def _sort_numbers(rng: Random) -> Exchange:
    numbers = rng.sample(range(100), rng.randint(2, 4))
    items, answer = [str(n) for n in numbers], ", ".join(str(n) for n in sorted(numbers))
    return _exchange("sort", items, rng.choice(_SORT_NUMBERS).format(l=_listed(rng, items)), answer)


def _count(rng: Random) -> Exchange:
    items = _words(rng, 2, 8)
    question = rng.choice(_COUNT).format(l=_listed(rng, items))
    return _exchange("count", items, question, f"There are {len(items)} words.")


def _reverse(rng: Random) -> Exchange:
    items = _words(rng, 2, 5)
    return _exchange("reverse", items, rng.choice(_REVERSE).format(l=_listed(rng, items)), ", ".join(items[::-1]))


def _ends(rng: Random) -> Exchange:
    items, first = _words(rng, 2, 6), rng.random() < 0.5
    question = rng.choice(_FIRST if first else _LAST).format(l=_listed(rng, items))
    return _exchange(f"end {first}", items, question, items[0] if first else items[-1])


def _has(rng: Random) -> Exchange:
    items = _words(rng, 3, 6)
    word = rng.choice(items) if rng.random() < 0.5 else rng.choice(WORD_LIST)
    answer = f"Yes, {word} is in the list." if word in items else f"No, {word} is not in the list."
    return _exchange(f"has {word}", items, rng.choice(_HAS).format(w=word, l=_listed(rng, items)), answer)
