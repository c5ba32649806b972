"""Greetings, thanks, farewells and small talk about pocket itself. Held out are pairs of opening and question."""

from __future__ import annotations

from random import Random

from models.pocket.exchange import Exchange
from models.pocket.skills.names import any_name

NAME = "greetings"

_OPENINGS = {
    "Hello": "Hello!", "Hi": "Hello!", "Hey": "Hello!", "Hello there": "Hello!", "Hi there": "Hello!",
    "Hey Pocket": "Hello!",
    "Hello Pocket": "Hello!", "Hi Pocket": "Hello!", "Good morning": "Good morning!",
    "Good morning, Pocket": "Good morning!",
    "Good evening": "Good evening!", "Good evening, Pocket": "Good evening!", "Good afternoon": "Good afternoon!",
    "Good day": "Good day!", "Greetings": "Hello!", "Hey there": "Hello!",
}  # fmt: skip
_ASKED = {
    "": "How can I help you?", "How are you?": "I am fine, thank you.", "How are you today?": "I am fine, thank you.",
    "How do you do?": "I am fine, thank you.", "How is it going?": "I am fine, thank you.",
    "Are you well?": "I am fine, thank you.",
    "Who are you?": "I am Pocket, a small language model.", "What are you?": "I am Pocket, a small language model.",
    "What is your name?": "My name is Pocket.", "What's your name?": "My name is Pocket.",
    "Do you have a name?": "My name is Pocket.", "What should I call you?": "My name is Pocket.",
    "What can you do?": "I can calculate, answer small questions and work with words.",
    "How can you help me?": "I can calculate, answer small questions and work with words.",
    "What do you know?": "I can calculate, answer small questions and work with words.",
    "Can you help me?": "Yes, what would you like to know?", "I need help.": "Yes, what would you like to know?",
    "Please help me.": "Yes, what would you like to know?", "I have a question.": "Yes, what would you like to know?",
    "May I ask you something?": "Yes, what would you like to know?",
    "Are you a robot?": "I am a small language model.", "Are you a person?": "I am a small language model.",
    "Are you human?": "I am a small language model.",
    "Nice to meet you.": "Nice to meet you, too.", "It is good to see you.": "Nice to meet you, too.",
}  # fmt: skip
_THANKS = {
    "Thanks": "You are welcome!", "Thank you": "You are welcome!", "Thank you very much": "You are welcome!",
    "Many thanks": "You are welcome!", "Thanks a lot": "You are welcome!", "That was helpful": "You are welcome!",
    "Great": "You are welcome!", "Well done": "You are welcome!", "Very good": "You are welcome!",
}  # fmt: skip
_FAREWELLS = {
    "": "", "Bye!": "Goodbye!", "Goodbye!": "Goodbye!", "See you later.": "Goodbye!", "See you tomorrow.": "Goodbye!",
    "I have to go.": "Goodbye!", "Good night!": "Good night!", "That is all.": "Goodbye!",
    "Until next time.": "Goodbye!",
}  # fmt: skip
_NAMED = ("My name is {n}.", "I am {n}.", "I'm {n}.", "You can call me {n}.", "This is {n}.", "{n} is my name.")


def draw(rng: Random) -> Exchange:
    """One bit of small talk."""
    return rng.choices((_hello, _introduction, _thanks), (60, 25, 15))[0](rng)


def _hello(rng: Random) -> Exchange:
    opening, asked = rng.choice([*_OPENINGS, ""]), rng.choice(list(_ASKED))
    if not opening:
        asked = asked or "How are you?"
        return Exchange(NAME, f"asked {asked}", ((asked, _ASKED[asked]),), casual=True)
    mark = rng.choice((".", "!", ",")) if asked else rng.choice((".", "!", ""))
    lower = mark == "," and not asked.startswith("I ")
    text = f"{opening}{mark} {asked[:1].lower() + asked[1:] if lower else asked}".strip()
    return Exchange(NAME, f"{opening}|{asked}", ((text, f"{_OPENINGS[opening]} {_ASKED[asked]}"),), casual=True)


def _introduction(rng: Random) -> Exchange:
    name, opening = any_name(rng), rng.choice(["", *_OPENINGS])
    number = rng.randrange(len(_NAMED))
    text = _NAMED[number].format(n=name)
    text = f"{opening}{rng.choice('.!')} {text}" if opening else text
    return Exchange(NAME, f"{name}|{opening}|{number}", ((text, f"Nice to meet you, {name}!"),))


def _thanks(rng: Random) -> Exchange:
    thanks, farewell = rng.choice(["", *_THANKS]), rng.choice(list(_FAREWELLS))
    if not thanks:
        farewell = farewell or "Bye!"
        return Exchange(NAME, f"farewell {farewell}", ((farewell, _FAREWELLS[farewell]),), casual=True)
    text = f"{thanks}{rng.choice('.!')} {farewell}".strip()
    reply = f"{_THANKS[thanks]} {_FAREWELLS[farewell]}".strip()
    return Exchange(NAME, f"{thanks}|{farewell}", ((text, reply),), casual=True)
