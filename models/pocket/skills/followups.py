"""Several turns that belong together: what was told is remembered, "and of Spain?" is understood."""

from __future__ import annotations

from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, article, sentence
from models.pocket.skills import arithmetic, facts
from models.pocket.skills.names import any_name, any_place

NAME = "followups"

_TOLD = {
    "name": (
        ("My name is {v}.", "I am {v}.", "I'm {v}.", "You can call me {v}.", "Hello, my name is {v}."),
        "Nice to meet you, {v}!",
        ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "How am I called?"),
        "Your name is {v}.",
    ),
    "city": (
        ("I live in {v}.", "My home is in {v}.", "I come from {v}.", "I am at home in {v}."),
        "I will remember that.",
        ("Where do I live?", "Which city do I live in?", "Do you remember where I live?", "Where is my home?"),
        "You live in {v}.",
    ),
    "food": (
        ("I like {v}.", "My favourite food is {v}.", "I love {v}.", "I always order {v}."),
        "I will remember that.",
        ("What do I like?", "What is my favourite food?", "Do you remember what I like?", "What do I love?"),
        "You like {v}.",
    ),
    "pet": (
        ("I have a {v}.", "My pet is a {v}.", "At home I have a {v}.", "There is a {v} in my house."),
        "I will remember that.",
        ("What pet do I have?", "Which animal do I have?", "Do you remember my pet?", "What is my pet?"),
        "You have a {v}.",
    ),
    "age": (
        ("I am {v} years old.", "My age is {v}.", "I turned {v} this year.", "I'm {v} years old."),
        "I will remember that.",
        ("How old am I?", "What is my age?", "Do you remember how old I am?", "What's my age?"),
        "You are {v} years old.",
    ),
}  # fmt: skip
_AGAIN = ("Say that again.", "Can you repeat that?", "What did you say?", "Once more, please.", "Please repeat that.")
_THANKS = ("Thanks.", "Thank you.", "Thanks a lot.", "Thank you very much.")
_STEPS = ("Plus {n}?", "And plus {n}?", "Add {n}.", "Now add {n}.")


def draw(rng: Random) -> Exchange:
    """One short conversation."""
    return rng.choices(
        (_told, _two_told, _same_kind, _in_other_language, _add, _again, _not_told), (30, 12, 30, 12, 8, 8, 4)
    )[0](rng)


def _value(rng: Random, what: str) -> str:
    if what == "name":
        return any_name(rng)
    if what == "city":
        return any_place(rng)
    if what == "age":
        return str(rng.randrange(5, 100))
    return rng.choice(world.FOODS if what == "food" else [a for a in world.ANIMALS if article(a).startswith("a ")])


def _telling(rng: Random, what: str, value: str) -> tuple[str, str]:
    told, reply, _, _ = _TOLD[what]
    return rng.choice(told).format(v=value), reply.format(v=value)


def _asking(rng: Random, what: str, value: str) -> tuple[str, str]:
    _, _, asked, answer = _TOLD[what]
    return rng.choice(asked), answer.format(v=value)


def _filler(rng: Random, most: int = 3) -> list[Exchange]:
    return [_something(rng) for _ in range(rng.choice([count for count in (0, 0, 1, 1, 2, 3) if count <= most]))]


def _something(rng: Random) -> Exchange:
    return rng.choice((facts.draw, arithmetic.draw))(rng)


def _remembered(
    what: str, value: str, telling: tuple[tuple[str, str], ...], between: list[Exchange], asking: tuple[str, str]
) -> Exchange:
    turns = (*telling, *(exchange.turns[0] for exchange in between), asking)
    return Exchange(NAME, f"{what}|{value}|{asking[0]}", turns, tuple(exchange.full_key for exchange in between))


def _told(rng: Random) -> Exchange:
    what = rng.choice(list(_TOLD))
    value = _value(rng, what)
    return _remembered(what, value, (_telling(rng, what, value),), _filler(rng), _asking(rng, what, value))


def _two_told(rng: Random) -> Exchange:
    one, two = rng.sample(list(_TOLD), 2)
    values = {what: _value(rng, what) for what in (one, two)}
    asked = rng.choice((one, two))
    telling = tuple(_telling(rng, what, values[what]) for what in (one, two))
    return _remembered(asked, values[asked], telling, _filler(rng, 1), _asking(rng, asked, values[asked]))


def _same_kind(rng: Random) -> Exchange:
    kind = facts.pick_kind(rng)
    while not kind.follow_up:
        kind = facts.pick_kind(rng)
    first, *rest = rng.sample(kind.table, rng.choice((2, 2, 3)))
    opening = facts.ask(rng, kind, first)
    turns = list(opening.turns)
    for fact in rest:
        question = rng.choice(kind.follow_up)
        turns.append((question.format(**fact), sentence(kind.answer.format(**fact))))
    return Exchange(NAME, f"{kind.name}|{rest[-1]['s']}|{question}", tuple(turns), (opening.full_key,), casual=True)


def _in_other_language(rng: Random) -> Exchange:
    word = rng.choice(list(world.TRANSLATIONS))
    one, two = rng.sample(range(len(world.LANGUAGES)), 2)
    opening = facts.ask(rng, facts.TRANSLATE[one], facts.TRANSLATE[one].table[list(world.TRANSLATIONS).index(word)])
    follow_up = rng.choice(("And in {l}?", "What about {l}?", "And in {l}, please?", "How about in {l}?")).format(
        l=world.LANGUAGES[two]
    )
    reply = sentence(f"{word} is {world.TRANSLATIONS[word][two]} in {world.LANGUAGES[two]}.")
    turns = (*opening.turns, (follow_up, reply))
    return Exchange(NAME, f"{word}|{follow_up}", turns, (opening.full_key,), casual=True)


def _add(rng: Random) -> Exchange:
    opening, result = arithmetic.draw_sum(rng)
    n = rng.randrange(1, 10)
    step = rng.choice(_STEPS).format(n=n)
    turns = (*opening.turns, (step, f"{result} + {n} = {result + n}."))
    return Exchange(
        NAME, f"{result}+{n}|{step}", turns, (opening.full_key, f"{arithmetic.NAME}|{result}+{n}"), casual=True
    )


def _again(rng: Random) -> Exchange:
    said = _something(rng)
    if rng.random() < 0.3:
        last, key = (rng.choice(_THANKS), "You are welcome!"), f"thanks|{said.key}"
    else:
        last, key = (rng.choice(_AGAIN), said.turns[0][1]), f"again|{said.key}"
    return Exchange(NAME, key, (said.turns[0], last), (said.full_key,))


def _not_told(rng: Random) -> Exchange:
    between, what = _filler(rng, 1), rng.choice(list(_TOLD))
    question = rng.choice(_TOLD[what][2])
    turns = (*(exchange.turns[0] for exchange in between), (question, "I don't know that."))
    also = tuple(exchange.full_key for exchange in between)
    return Exchange(NAME, f"not told|{question}|{len(between)}", turns, also, opens=True)
