"""Facts: every kind has a dozen phrasings, and each fact is held out under some of them.

`KINDS` also serves the yes/no questions and the follow-ups, which ask the same facts in other ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, article, fill, sentence

NAME = "facts"


@dataclass(frozen=True)
class Kind:
    """A kind of fact: how it is asked, how it is answered, and its table."""

    name: str
    questions: tuple[str, ...]
    answer: str
    table: tuple[dict[str, str], ...]
    """Fields of each fact; "s" is the subject and "v" the value."""
    yes_no: str = ""
    """The question whether `v` is right for `s`; empty when the kind is not asked so."""
    follow_up: tuple[str, ...] = field(default=())
    """Short questions for another subject of the same kind."""
    claim: str = "{v}"
    """How a wrong `v` is denied after "not"."""


def _rows(pairs: dict[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"s": subject, "v": value, "a": article(subject)} for subject, value in pairs.items())


def _order(items: tuple[str, ...], step: int) -> dict[str, str]:
    return {item: items[(i + step) % len(items)] for i, item in enumerate(items)}


CAPITAL = Kind(
    "capital",
    (
        "What is the capital of {s}?", "What's the capital of {s}?", "Which city is the capital of {s}?",
        "Tell me the capital of {s}.", "Name the capital of {s}.", "{s}: what is its capital?",
        "Do you know the capital of {s}?", "Can you tell me the capital of {s}?", "The capital of {s} is which city?",
        "What is the capital city of {s}?", "Please tell me the capital of {s}.", "I want to know the capital of {s}.",
        "What city is the capital of {s}?", "Capital of {s}?",
    ),
    "The capital of {s} is {v}.",
    _rows({country: capital for country, (capital, _) in world.COUNTRIES.items()}),
    "Is {v} the capital of {s}?",
    ("And of {s}?", "And the capital of {s}?", "What about {s}?", "And {s}?"),
)  # fmt: skip
CAPITAL_OF = Kind(
    "capital-of",
    (
        "{s} is the capital of which country?", "Which country has {s} as its capital?",
        "Of which country is {s} the capital?",
        "What country is {s} the capital of?", "Tell me which country {s} is the capital of.",
        "{s} is the capital of what?",
    ),
    "{s} is the capital of {v}.",
    _rows({capital: country for country, (capital, _) in world.COUNTRIES.items()}),
)  # fmt: skip
CONTINENT = Kind(
    "continent",
    (
        "Where is {s}?", "On which continent is {s}?", "In which continent does {s} lie?", "Which continent is {s} in?",
        "What continent is {s} on?", "Tell me where {s} is.", "In what part of the world is {s}?",
        "Where can I find {s}?",
        "Where does {s} lie?", "Do you know where {s} is?",
    ),
    "{s} is in {v}.",
    _rows({country: continent for country, (_, continent) in world.COUNTRIES.items()}),
    "Is {s} in {v}?",
    ("And {s}?", "What about {s}?", "And where is {s}?"),
)  # fmt: skip
COLOUR = Kind(
    "colour",
    (
        "What colour is {s}?", "Which colour is {s}?", "Tell me the colour of {s}.", "What is the colour of {s}?",
        "What colour does {s} have?", "Do you know the colour of {s}?", "Name the colour of {s}.",
        "Of what colour is {s}?",
        "Can you tell me what colour {s} is?", "What's the colour of {s}?",
    ),
    "The colour of {s} is {v}.",
    _rows(world.COLOURS),
    "Is {s} {v}?",
    ("And {s}?", "What about {s}?", "And what colour is {s}?"),
)  # fmt: skip
SOUND = Kind(
    "sound",
    (
        "What sound does {a} make?", "What does {a} say?", "Which sound does {a} make?", "What noise does {a} make?",
        "How does {a} sound?", "Tell me the sound of {a}.", "What is the sound of {a}?", "{A} makes which sound?",
        "Do you know what {a} says?",
    ),
    "{A} says {v}.",
    tuple({**row, "A": row["a"].capitalize()} for row in _rows(world.SOUNDS)),
    "Does {a} say {v}?",
    ("And {a}?", "What about {a}?"),
)  # fmt: skip
YOUNG = Kind(
    "young",
    (
        "What is a young {s} called?", "What do you call a baby {s}?", "What is a baby {s}?",
        "How do you call a young {s}?",
        "What is the name for a young {s}?", "Tell me the word for a baby {s}.", "A young {s} is called what?",
        "What's the young of a {s} called?", "Which word means a young {s}?",
    ),
    "A young {s} is called a {v}.",
    _rows(world.YOUNG),
    "Is a young {s} called a {v}?",
    ("And a young {s}?", "And a baby {s}?"),
    claim="a {v}",
)  # fmt: skip
HOME = Kind(
    "home",
    (
        "Where does a {s} live?", "What does a {s} live in?", "In what does a {s} live?", "What is the home of a {s}?",
        "Tell me where a {s} lives.", "Where is a {s} at home?", "What's the home of a {s} called?",
        "Do you know where a {s} lives?",
    ),
    "A {s} lives in a {v}.",
    _rows(world.HOMES),
    "Does a {s} live in a {v}?",
    ("And a {s}?", "What about a {s}?", "And where does a {s} live?"),
    claim="a {v}",
)  # fmt: skip
LEGS = Kind(
    "legs",
    (
        "How many legs does {a} have?", "How many legs has {a} got?", "What number of legs does {a} have?",
        "Tell me how many legs {a} has.", "{A} has how many legs?", "Can you say how many legs {a} has?",
        "On how many legs does {a} stand?", "How many legs are there on {a}?",
    ),
    "{A} has {v} legs.",
    tuple({**row, "A": row["a"].capitalize()} for row in _rows(world.LEGS)),
    "",
    ("And {a}?", "What about {a}?"),
)  # fmt: skip
OPPOSITE = Kind(
    "opposite",
    (
        "What is the opposite of {s}?", "What's the opposite of {s}?", "Tell me the opposite of {s}.",
        "Which word is the opposite of {s}?", "Name the opposite of {s}.", "{s}: what is the opposite?",
        "Give me the opposite of {s}.", "What word means the opposite of {s}?", "The opposite of {s} is what?",
        "Opposite of {s}?", "What is the contrary of {s}?",
    ),
    "The opposite of {s} is {v}.",
    _rows({a: b for pair in world.OPPOSITES for a, b in (pair, pair[::-1])}),
    "Is {v} the opposite of {s}?",
    ("And of {s}?", "And the opposite of {s}?", "What about {s}?"),
)  # fmt: skip
AFTER = Kind(
    "after",
    (
        "What comes after {s}?", "What follows {s}?", "Which one comes after {s}?", "Tell me what comes after {s}.",
        "After {s} comes what?", "What is next after {s}?", "What comes right after {s}?", "{s} is followed by what?",
    ),
    "After {s} comes {v}.",
    _rows({**_order(world.DAYS, 1), **_order(world.MONTHS, 1), **_order(world.SEASONS, 1)}),
    "Does {v} come after {s}?",
    ("And after {s}?", "And {s}?"),
)  # fmt: skip
BEFORE = Kind(
    "before",
    (
        "What comes before {s}?", "What is before {s}?", "Which one comes before {s}?",
        "Tell me what comes before {s}.",
        "Before {s} comes what?", "What comes right before {s}?", "{s} comes after what?",
        "What comes just before {s}?",
    ),
    "Before {s} comes {v}.",
    _rows({**_order(world.DAYS, -1), **_order(world.MONTHS, -1), **_order(world.SEASONS, -1)}),
    "Does {v} come before {s}?",
    ("And before {s}?", "And {s}?"),
)  # fmt: skip
ORDER = Kind(
    "order",
    (
        "What is the {s}?", "Which one is the {s}?", "Tell me the {s}.", "Name the {s}.", "What's the {s}?",
        "Do you know the {s}?", "Can you tell me the {s}?", "What do you call the {s}?",
    ),
    "The {s} is {v}.",
    _rows(
        {f"{world.ORDINALS[i]} month of the year": month for i, month in enumerate(world.MONTHS)}
        | {f"{world.ORDINALS[i]} day of the week": day for i, day in enumerate(world.DAYS)}
        | {f"{world.ORDINALS[i]} planet from the sun": planet for i, planet in enumerate(world.PLANETS)}
    ),
    "Is {v} the {s}?",
    ("And the {s}?", "What about the {s}?"),
)  # fmt: skip
_WHOLES = {"alphabet": "the alphabet", "hour": "an hour", "euro": "a euro"}
UNIT = Kind(
    "unit",
    (
        "How many {s} are in {a}?", "How many {s} are there in {a}?", "How many {s} does {a} have?",
        "{A} has how many {s}?",
        "Tell me how many {s} {a} has.", "What number of {s} is in {a}?", "How many {s} make up {a}?",
        "Do you know how many {s} {a} has?", "Number of {s} in {a}?",
    ),
    "{A} has {v} {s}.",
    tuple(
        {"s": parts, "v": count, "a": whole_name, "A": whole_name.capitalize()}
        for (parts, whole), count in world.UNITS.items()
        for whole_name in [_WHOLES.get(whole) or article(whole)]
    ),
    "Does {a} have {v} {s}?",
)  # fmt: skip
JOB = Kind(
    "job",
    (
        "What does a {s} do?", "What is the job of a {s}?", "Tell me what a {s} does.", "What is a {s}'s work?",
        "What kind of work does a {s} do?", "Do you know what a {s} does?", "What does a {s} do for work?",
        "Can you tell me what a {s} does?",
    ),
    "A {s} {v}.",
    _rows(world.JOBS),
    "",
    ("And a {s}?", "What about a {s}?"),
)  # fmt: skip
WHO = Kind(
    "who",
    (
        "Who {s}?", "Tell me who {s}.", "Which person {s}?", "Do you know who {s}?", "Whose job is it: who {s}?",
        "What do you call someone who {s}?", "Someone who {s} is called what?", "Can you tell me who {s}?",
    ),
    "{V} {s}.",
    tuple(
        {"s": work, "v": job, "V": article(job).capitalize(), "a": work} for job, work in world.JOBS.items()
    ),
)  # fmt: skip
PLURAL = Kind(
    "plural",
    (
        "What is the plural of {s}?", "What's the plural of {s}?", "Tell me the plural of {s}.",
        "Give me the plural of {s}.",
        "One {s}, two what?", "How do you say more than one {s}?", "Plural of {s}?",
        "What do you call many of the word {s}?",
        "Which word is the plural of {s}?",
    ),
    "The plural of {s} is {v}.",
    _rows(world.PLURALS),
    "Is {v} the plural of {s}?",
    ("And of {s}?", "And the plural of {s}?"),
)  # fmt: skip
PAST = Kind(
    "past",
    (
        "What is the past of {s}?", "What is the past tense of {s}?", "What's the past form of {s}?",
        "Put {s} into the past.",
        "Tell me the past tense of {s}.", "Give me the past of {s}.", "Past tense of {s}?",
        "I {s} today. What did I do yesterday?",
        "Which word is the past of {s}?",
    ),
    "The past of {s} is {v}.",
    _rows(world.PAST),
    "Is {v} the past of {s}?",
    ("And of {s}?", "And the past of {s}?"),
)  # fmt: skip
KIND = Kind(
    "kind",
    (
        "What is {a}?", "What kind of thing is {a}?", "Tell me what {a} is.", "What sort of thing is {a}?",
        "Do you know what {a} is?",
        "What's {a}?", "What do we call {a}?", "{A} is what kind of thing?",
    ),
    "{A} is {v}.",
    tuple(
        {"s": thing, "v": article(kind), "a": article(thing), "A": article(thing).capitalize()}
        for thing, kind in world.KINDS.items()
    ),
    "Is {a} {v}?",
    ("And {a}?", "What about {a}?"),
)  # fmt: skip


def _translation(number: int) -> Kind:
    language = world.LANGUAGES[number]
    return Kind(
        f"translate-{language}",
        (
            f"How do you say {{s}} in {language}?", f"What is {{s}} in {language}?",
            f"Translate {{s}} into {language}.",
            f"What is the {language} word for {{s}}?", f"Say {{s}} in {language}.", f"{{s}} in {language}?",
            f"Tell me the {language} word for {{s}}.", f"What's {{s}} in {language}?", f"In {language}, what is {{s}}?",
            f"How would you say {{s}} in {language}?",
        ),
        f"{{s}} is {{v}} in {language}.",
        _rows({word: forms[number] for word, forms in world.TRANSLATIONS.items()}),
        f"Is {{s}} {{v}} in {language}?",
        ("And {s}?", "What about {s}?"),
    )  # fmt: skip


TRANSLATE = tuple(_translation(number) for number in range(len(world.LANGUAGES)))
ALL_KINDS: tuple[Kind, ...] = (
    CAPITAL, CAPITAL_OF, CONTINENT, COLOUR, SOUND, YOUNG, HOME, LEGS, OPPOSITE, AFTER, BEFORE, ORDER, UNIT, JOB, WHO,
    PLURAL, PAST, KIND, *TRANSLATE,
)  # fmt: skip
_WEIGHTS = [len(kind.table) ** 0.75 for kind in ALL_KINDS]


def pick_kind(rng: Random) -> Kind:
    """A kind of fact; larger tables come more often."""
    return rng.choices(ALL_KINDS, _WEIGHTS)[0]


def ask(rng: Random, kind: Kind, fact: dict[str, str]) -> Exchange:
    """One fact in one phrasing."""
    number, question = fill(rng, kind.questions, **fact)
    turn = (sentence(question), sentence(kind.answer.format(**fact)))
    return Exchange(NAME, f"{kind.name}|{fact['s']}|{fact['a']}|{number}", (turn,), casual=True)


def draw(rng: Random) -> Exchange:
    """Any fact in any phrasing."""
    kind = pick_kind(rng)
    return ask(rng, kind, rng.choice(kind.table))
