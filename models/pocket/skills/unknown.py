"""Questions from outside the world, and the one polite reply to them all. Held out are pairs of question and topic."""

from __future__ import annotations

from random import Random

from models.pocket import world
from models.pocket.exchange import Exchange, fill
from models.pocket.skills import facts
from models.pocket.skills.names import any_name, any_place, made_up

NAME = "unknown"
REPLY = "I don't know that."

_QUESTIONS = (
    "Who won the {game} match {when}?", "What is the weather in {city} {when}?", "Will it rain in {city} {when}?",
    "Who wrote {title}?",
    "Who is the president of {country}?", "How many people live in {city}?", "How many people live in {country}?",
    "What does {thing} cost in {city}?", "What is the price of {thing}?", "When was {person} born?", "Who is {person}?",
    "Where does {person} live?", "How old is {person}?", "Why is {topic} important?", "Explain {topic} to me.",
    "What is {topic}?",
    "How does {topic} work?", "Write a poem about {topic}.", "Tell me a story about {topic}.",
    "Write a program for {topic}.",
    "Who invented {topic}?", "What do you think about {topic}?", "Which {game} player is the best?",
    "What is the phone number of {person}?",
    "What happened in {year}?", "Who was king of {country} in {year}?", "How far is it from {city} to {city2}?",
    "How do I cook {food}?",
    "What is the meaning of {topic}?", "What time is it in {city}?", "Give me news about {topic}.",
    "How deep is the lake near {city}?",
    "What is on television {when}?", "How heavy is {thing}?", "Which film should I watch {when}?",
    "What did {person} say {when}?",
    "Can you book a flight to {city}?", "Open the website of {person}.", "What is the best hotel in {city}?",
    "Recommend a song about {topic}.",
)  # fmt: skip
_GAMES = ("football", "tennis", "chess", "hockey", "basketball", "golf", "baseball", "cricket")
_WHEN = ("yesterday", "today", "tomorrow", "last week", "tonight", "next month", "last year", "on Sunday")
_TOPICS = (
    "gravity", "music", "democracy", "physics", "love", "history", "the internet", "electricity", "philosophy", "money",
    "time",
    "space", "war", "peace", "art", "chemistry", "evolution", "politics", "the stock market", "religion", "health",
    "energy",
    "photosynthesis", "the moon landing", "quantum mechanics", "medicine", "law", "architecture", "poetry",
    "the steam engine",
)  # fmt: skip
_TITLES = ("this book", "that song", "the long poem", "the old play", "the famous novel", "this letter")


def draw(rng: Random) -> Exchange:
    """One question that pocket cannot answer."""
    return _made_up_fact(rng) if rng.random() < 0.4 else _outside(rng)


def _outside(rng: Random) -> Exchange:
    person = f"{any_name(rng)} {made_up(rng).capitalize()}"
    _, question = fill(
        rng, _QUESTIONS, game=rng.choice(_GAMES), when=rng.choice(_WHEN), city=any_place(rng), city2=any_place(rng),
        title=rng.choice(_TITLES), country=rng.choice(list(world.COUNTRIES)), thing=f"a {rng.choice(world.THINGS)}",
        person=person, topic=rng.choice(_TOPICS), year=rng.randrange(1000, 2030), food=rng.choice(world.FOODS),
    )  # fmt: skip
    return Exchange(NAME, question, ((question, REPLY),), casual=True)


def _made_up_fact(rng: Random) -> Exchange:
    kind = rng.choice((facts.CAPITAL, facts.CONTINENT, facts.CAPITAL_OF, facts.OPPOSITE, facts.KIND, *facts.TRANSLATE))
    word = made_up(rng)
    word = word.capitalize() if kind in (facts.CAPITAL, facts.CONTINENT, facts.CAPITAL_OF) else word
    _, question = fill(rng, kind.questions, s=word, a=f"a {word}", A=f"A {word}")
    question = question[:1].upper() + question[1:]
    return Exchange(NAME, question, ((question, REPLY),))
