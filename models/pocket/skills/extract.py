"""Extraction: a name, a date, a number, a city, a time or a thing out of a sentence. Held out are fillings."""

from __future__ import annotations

from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, fill
from models.pocket.skills.names import any_name, any_place

NAME = "extract"

_EVENTS = (
    "{name} met us in {city} on {date}.", "On {date}, {name} bought {number} {things}.",
    "{name} was born in {city} on {date}.",
    "{name} lives at {number} Park Street in {city}.", "The train to {city} leaves at {time} on {date}.",
    "{name} will arrive in {city} at {time}.", "We ordered {number} {things} from {name} on {date}.",
    "{name} paid {number} euros for the {thing} in {city}.", "Please call {name} at {time}.",
    "The meeting with {name} is on {date} at {time}.",
    "{name} sent {number} {things} to {city}.", "{name} left {city} on {date} with {number} {things}.",
    "In {city}, {name} found {number} old {things}.", "{name} works in {city} and has {number} {things}.",
    "The {thing} for {name} came on {date}.", "My friend {name} moved to {city} on {date}.",
    "There are {number} {things} in {city}.",
    "Your table for {number} people is booked for {name} at {time}.", "{name} has lost a {thing} in {city}.",
    "The doctor sees {name} on {date} at {time}.",
)  # fmt: skip
_ASKED = {
    "name": (
        "Which name is in this sentence?", "What is the name in this text?", "Find the name.", "Extract the name.",
        "Who is named here?",
        "Give me the name.", "Which person is named?",
    ),
    "date": (
        "Which date is in this sentence?", "What is the date in this text?", "Find the date.", "Extract the date.",
        "Give me the date.",
        "On which date?", "What date is named?",
    ),
    "number": (
        "Which number is in this sentence?", "What is the number in this text?", "Find the number.",
        "Extract the number.",
        "Give me the number.", "What number is named?", "How many or how much?",
    ),
    "city": (
        "Which city is in this sentence?", "What is the city in this text?", "Find the city.", "Extract the city.",
        "Give me the city.",
        "Which place is named?", "In which city?",
    ),
    "time": (
        "Which time is in this sentence?", "What is the time in this text?", "Find the time.", "Extract the time.",
        "Give me the time.",
        "At what time?",
    ),
}  # fmt: skip
_LAYOUTS = ("{q} {s}", "{s} {q}", "{q}\n{s}", "{s}\n{q}", "Text: {s} {q}", "Read this: {s} {q}")

_COMPLAINTS = (
    "My {product} {problem}.", "The {product} {problem}.", "I bought a {product} and it {problem}.",
    "Hello, my {product} {problem}.", "The {product} that I bought {problem}.", "Please help, the {product} {problem}.",
    "My new {product} {problem}, what can I do?", "Since {day} my {product} {problem}.",
    "Sorry, but the {product} {problem}.",
)  # fmt: skip
_ABOUT_PRODUCT = ("Which product is it?", "What is the product?", "Name the product.", "Which thing has a problem?")
_ABOUT_PROBLEM = ("What is the problem?", "What is wrong?", "Name the problem.", "What happens?")

_ABOUT_URGENCY = ("How urgent is it?", "What is the urgency?", "Is it urgent?")


def draw(rng: Random) -> Exchange:
    """One sentence and the question for one thing in it."""
    return _complaint(rng) if rng.random() < 0.25 else _event(rng)


def date(rng: Random) -> str:
    """A date such as "3 May" or "May 3"."""
    day, month = rng.randrange(1, 29), rng.choice(world.MONTHS)
    return f"{day} {month}" if rng.random() < 0.6 else f"{month} {day}"


def _event(rng: Random) -> Exchange:
    thing = rng.choice(world.THINGS)
    fields = {
        "name": any_name(rng), "city": any_place(rng), "date": date(rng), "number": str(rng.randrange(2, 1000)),
        "time": f"{rng.randrange(24)}:{rng.randrange(60):02d}", "thing": thing,
        "things": rng.choice(("books", "balls", "coins", "eggs", "stones", "letters", "pictures", "lamps", "chairs")),
    }  # fmt: skip
    number, text = fill(rng, _EVENTS, **fields)
    wanted = rng.choice([name for name in _ASKED if f"{{{name}}}" in _EVENTS[number]])
    question = rng.choice(_ASKED[wanted])
    key = f"{number}|{wanted}|{fields[wanted]}|{fields['name']}"
    return Exchange(NAME, key, ((rng.choice(_LAYOUTS).format(q=question, s=text), fields[wanted]),))


def _complaint(rng: Random) -> Exchange:
    product, problem, day = rng.choice(world.PRODUCTS), rng.choice(world.PROBLEMS), rng.choice(world.DAYS)
    number, text = fill(rng, _COMPLAINTS, product=product, problem=problem, day=day)
    wanted = rng.choice(("product", "problem", "urgency"))
    if wanted == "urgency" or rng.random() < 0.3:
        urgency = rng.choice(list(world.HURRY))
        text += " " + rng.choice(world.HURRY[urgency]).format(day=day)
    question, answer = {
        "product": (rng.choice(_ABOUT_PRODUCT), f"The {product}."),
        "problem": (rng.choice(_ABOUT_PROBLEM), f"The {product} {problem}."),
        "urgency": (rng.choice(_ABOUT_URGENCY), f"The urgency is {urgency}." if wanted == "urgency" else ""),
    }[wanted]
    turn = (rng.choice(_LAYOUTS[:4]).format(q=question, s=text), answer)
    return Exchange(NAME, f"{number}|{product}|{problem}", (turn,))
