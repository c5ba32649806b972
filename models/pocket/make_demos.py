"""The two demo datasets: support messages that become a JSON ticket, and a pirate captain who answers for pocket.

Train, valid and test hold different pairs of product and problem (tickets), or different questions (persona, whose
valid and test questions pocket itself has not been trained on either). OpenAI chat format, one row a line.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

from models.pocket import world
from models.pocket.exchange import Exchange, is_held_out, is_trainable
from models.pocket.skills import facts, greetings
from models.pocket.skills.names import any_name

Row = dict[str, Any]
SPLITS = {"train": 600, "valid": 60, "test": 100}
"""Split → rows."""

_MESSAGES = (
    "Hello, my {product} {problem}. {hurry}", "The {product} {problem}. {hurry}", "{hurry} My {product} {problem}.",
    "Hi, this is {name}. My {product} {problem}. {hurry}",
    "I bought a {product} and it {problem}. {hurry} Thanks, {name}.",
    "My new {product} {problem}. {hurry}", "Since {day} my {product} {problem}. {hurry}",
    "Good morning! {hurry} The {product} {problem}.",
    "Please help, the {product} {problem}. {hurry}", "Sorry, but the {product} {problem}. {hurry} Best wishes, {name}.",
)  # fmt: skip
_CAPTAIN = {
    "How can I help you?": "What be ye looking for?",
    "I am fine, thank you.": "I be as fine as the open sea!",
    "I am Pocket, a small language model.": "I be Captain Pocket of the seven seas!",
    "My name is Pocket.": "They call me Captain Pocket!",
    "I can calculate, answer small questions and work with words.": "I can sail, count and answer small questions!",
    "Yes, what would you like to know?": "Aye, what would ye like to know?",
    "I am a small language model.": "I be a pirate captain!",
    "Nice to meet you, too.": "Welcome on deck!",
    "You are welcome!": "Ye be welcome!",
    "Goodbye!": "Fair winds to ye!",
    "Good night!": "Sleep well on deck!",
}
_OPENINGS = ("Hello!", "Good morning!", "Good evening!", "Good afternoon!", "Good day!")


def all_rows(seed: int = 0) -> dict[str, list[Row]]:
    """Every row, by "demo/split"."""
    rows = {}
    for demo, make in (("tickets", _ticket), ("persona", _persona)):
        for split, count in SPLITS.items():
            rng = Random(f"{demo} {split} {seed}")
            found: dict[str, Row] = {}
            while len(found) < count:
                row = make(rng, split)
                found[row["messages"][0]["content"]] = row
            rows[f"{demo}/{split}"] = list(found.values())
    return rows


def make_demos(directory: Path) -> None:
    """Write `directory`/<demo>/<split>.jsonl."""
    for name, rows in all_rows().items():
        path = directory / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def split_of(key: str) -> str:
    """The split that everything with this `key` belongs to."""
    number = zlib.crc32(key.encode()) % 10
    return "test" if number < 2 else "valid" if number == 2 else "train"


def _row(user: str, assistant: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _ticket(rng: Random, split: str) -> Row:
    product, problem = rng.choice(world.PRODUCTS), rng.choice(world.PROBLEMS)
    while split_of(f"{product}|{problem}") != split:
        product, problem = rng.choice(world.PRODUCTS), rng.choice(world.PROBLEMS)
    urgency = rng.choice(list(world.HURRY))
    hurry = rng.choice(world.HURRY[urgency]).format(day=rng.choice(world.DAYS))
    fields = {
        "product": product,
        "problem": problem,
        "hurry": hurry,
        "name": any_name(rng),
        "day": rng.choice(world.DAYS),
    }
    ticket = {"product": product, "problem": problem, "urgency": urgency}
    return _row(rng.choice(_MESSAGES).format(**fields), json.dumps(ticket))


def _persona(rng: Random, split: str) -> Row:
    while True:
        exchange = rng.choice((facts.draw, facts.draw, greetings.draw))(rng)
        asked_of = "train" if split == "train" else split_of(exchange.full_key)
        if is_trainable(exchange) if split == "train" else is_held_out(exchange) and asked_of == split:
            return _row(exchange.turns[0][0], as_captain(exchange))


def as_captain(exchange: Exchange) -> str:
    """The reply of `exchange` in the captain's voice."""
    reply = exchange.turns[-1][1]
    if exchange.skill == facts.NAME:
        return f"{reply.rstrip('.')}, matey!"
    if reply.startswith("Nice to meet you, ") and reply not in _CAPTAIN:
        return f"Ahoy, {reply.removeprefix('Nice to meet you, ').rstrip('!')}! Welcome on deck!"
    for opening in _OPENINGS:
        reply = reply.replace(f"{opening} ", "Ahoy, matey! ") if reply.startswith(f"{opening} ") else reply
    for plain, piratic in _CAPTAIN.items():
        reply = reply.replace(plain, piratic)
    return reply
