"""Short rephrasings with one right answer: negated, asked, passive, polite … Held out are sentences."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, article
from models.pocket.skills.names import any_name

NAME = "rephrase"


@dataclass(frozen=True)
class Verb:
    """The forms of a verb and what it can be done to."""

    base: str
    third: str
    past: str
    participle: str
    objects: tuple[str, ...]


_ANY = (*world.ANIMALS, *world.THINGS)
_VERBS = (
    Verb("see", "sees", "saw", "seen", _ANY),
    Verb("like", "likes", "liked", "liked", _ANY),
    Verb("find", "finds", "found", "found", _ANY),
    Verb("buy", "buys", "bought", "bought", world.THINGS),
    Verb("wash", "washes", "washed", "washed", _ANY),
    Verb("paint", "paints", "painted", "painted", world.THINGS),
    Verb("hold", "holds", "held", "held", world.THINGS),
    Verb("take", "takes", "took", "taken", world.THINGS),
    Verb("follow", "follows", "followed", "followed", world.ANIMALS),
    Verb("feed", "feeds", "fed", "fed", world.ANIMALS),
    Verb("draw", "draws", "drew", "drawn", _ANY),
    Verb("clean", "cleans", "cleaned", "cleaned", world.THINGS),
)
_ASKED = {
    "negative": (
        "Make it negative: {s}",
        "Negate this sentence: {s}",
        "Say the opposite with not: {s}",
        "Put a not into this: {s}",
    ),
    "question": (
        "Make it a question: {s}",
        "Turn this into a question: {s}",
        "Ask this as a question: {s}",
        "Form a question: {s}",
    ),
    "past": (
        "Put it into the past: {s}",
        "Write this in the past tense: {s}",
        "Say it in the past: {s}",
        "Make it past tense: {s}",
    ),
    "passive": (
        "Put it into the passive: {s}",
        "Make it passive: {s}",
        "Write this in the passive voice: {s}",
        "Say it in the passive: {s}",
    ),
    "future": (
        "Put it into the future: {s}",
        "Say it in the future: {s}",
        "Write this in the future tense: {s}",
        "Make it future: {s}",
    ),
    "pronoun": (
        "Replace the subject with a pronoun: {s}",
        "Use it for the subject: {s}",
        "Say it with a pronoun: {s}",
    ),
}
_POLITE = ("Make it polite: {s}", "Say this politely: {s}", "Ask more politely: {s}", "Be more polite: {s}")
_SHORTER = ("Say it shorter: {s}", "Make it shorter: {s}", "Shorten this: {s}", "In fewer words: {s}")
_ORDERS = ("give me", "bring me", "show me", "open", "clean", "find", "hold", "take", "send me", "pass me")
_LONG = (
    ("The {t} is very, very {a}.", "The {t} is very {a}."), ("It is true that the {t} is {a}.", "The {t} is {a}."),
    ("I think that the {t} is maybe {a}.", "The {t} may be {a}."),
    ("The {t} is {a} and it is also {b}.", "The {t} is {a} and {b}."),
    ("The {t} is {a} and the {u} is {a}.", "The {t} and the {u} are {a}."),
    ("There is a {t} and it is {a}.", "There is a {a} {t}."),
    ("As you can see, the {t} is {a}.", "The {t} is {a}."),
    ("I would like to say that the {t} is {a}.", "The {t} is {a}."),
)  # fmt: skip


def draw(rng: Random) -> Exchange:
    """One sentence to say in another way."""
    return rng.choices((_sentence, _polite, _shorter), (65, 15, 20))[0](rng)


def _sentence(rng: Random) -> Exchange:
    verb = rng.choice(_VERBS)
    subject = any_name(rng) if rng.random() < 0.5 else f"The {rng.choice(world.ANIMALS)}"
    thing = "the " + (f"{rng.choice(world.ADJECTIVES)} " if rng.random() < 0.4 else "") + rng.choice(verb.objects)
    inner = subject if subject[:4] != "The " else "the" + subject[3:]
    way = rng.choice([way for way in _ASKED if way != "pronoun" or inner != subject])
    answer = {
        "negative": f"{subject} does not {verb.base} {thing}.",
        "question": f"Does {inner} {verb.base} {thing}?",
        "past": f"{subject} {verb.past} {thing}.",
        "passive": f"{thing.capitalize()} is {verb.participle} by {inner}.",
        "future": f"{subject} will {verb.base} {thing}.",
        "pronoun": f"It {verb.third} {thing}.",
    }[way]
    statement = f"{subject} {verb.third} {thing}."
    return Exchange(NAME, f"{way}|{statement}", ((rng.choice(_ASKED[way]).format(s=statement), answer),))


def _polite(rng: Random) -> Exchange:
    order, thing = rng.choice(_ORDERS), rng.choice(world.THINGS)
    adjective = f"{rng.choice(world.ADJECTIVES)} " if rng.random() < 0.4 else ""
    statement, answer = (
        f"{order.capitalize()} the {adjective}{thing}.",
        f"Could you {order} the {adjective}{thing}, please?",
    )
    return Exchange(NAME, f"polite|{statement}", ((rng.choice(_POLITE).format(s=statement), answer),))


def _shorter(rng: Random) -> Exchange:
    long, short = rng.choice(_LONG)
    (t, u), (a, b) = rng.sample((*world.ANIMALS, *world.THINGS), 2), rng.sample(world.ADJECTIVES, 2)
    fields = {"t": t, "u": u, "a": a, "b": b}
    statement, answer = long.format(**fields), short.format(**fields).replace(f"a {a} ", f"{article(a)} ")
    return Exchange(NAME, f"shorter|{statement}", ((rng.choice(_SHORTER).format(s=statement), answer),))
