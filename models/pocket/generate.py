"""Conversations from the skills: styled, mixed over turns, some with a system message; and the held-out questions.

Everything follows from a seed and the tables; nothing is read from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from models.pocket.exchange import Exchange, is_held_out, is_trainable
from models.pocket.skills import arithmetic, echo, extract, facts, followups, greetings, rephrase, unknown, words, yesno

Message = dict[str, str]

SKILLS: dict[str, Callable[[Random], Exchange]] = {
    module.NAME: module.draw
    for module in (greetings, arithmetic, facts, extract, words, rephrase, yesno, followups, unknown, echo)
}
"""Skill → how to draw from it."""
WEIGHTS: dict[str, float] = dict(zip(SKILLS, (4, 25, 15, 11, 21, 6, 23, 10, 4, 9), strict=True))
"""Skill → how often it comes in training, relative to the others."""

_SYSTEM = (
    "You are {w}.", "You are {w}. Answer in one short sentence.", "You are {w} and you answer briefly.",
    "Your name is Pocket. You are {w}.", "You are Pocket, {w}.", "Answer the user's questions.", "Be brief.",
    "You are {w}. Be {m} and {n}.", "Please be {m}.", "You help people with small questions.", "Be {m} and {n}.",
)  # fmt: skip
_WHO = (
    "a helpful assistant", "a friendly assistant", "a small language model", "a useful assistant", "an assistant",
    "a kind helper", "a chat assistant", "a polite helper", "a clever assistant", "a model that runs offline",
)  # fmt: skip
_MANNERS = ("helpful", "polite", "kind", "honest", "friendly", "exact", "clear", "short", "careful")


@dataclass(frozen=True)
class Question:
    """A held-out question: the messages so far and the one right reply."""

    skill: str
    messages: tuple[Message, ...]
    reply: str


def conversations(seed: int | str) -> Iterator[list[Message]]:
    """Training conversations without end."""
    rng = Random(f"train {seed}")
    while True:
        exchanges = [draw_trainable(rng) for _ in range(_turn_count(rng))]
        yield _conversation(rng, sorted(exchanges, key=lambda exchange: not exchange.opens))


def held_out(seed: int, per_skill: int) -> list[Question]:
    """`per_skill` different held-out questions of every skill, some of them behind a system message."""
    questions = []
    for skill, draw in SKILLS.items():
        rng = Random(f"held out {skill} {seed}")
        seen: set[tuple[tuple[str, str], ...]] = set()
        while len(seen) < per_skill:
            exchange = draw(rng)
            if is_held_out(exchange) and exchange.turns not in seen:
                seen.add(exchange.turns)
                *messages, reply = _conversation(rng, [exchange])
                questions.append(Question(skill, tuple(messages), reply["content"]))
    return questions


def draw_trainable(rng: Random) -> Exchange:
    """An exchange of any skill from the training side."""
    draw = SKILLS[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
    while True:
        exchange = draw(rng)
        if is_trainable(exchange):
            return exchange


def _turn_count(rng: Random) -> int:
    """Mostly one exchange; sometimes a few; rarely many, so that late positions are met as well."""
    return rng.choices((1, 2, 3, rng.randint(4, 8), rng.randint(9, 24)), (80, 10, 6, 3, 1))[0]


def _conversation(rng: Random, exchanges: list[Exchange]) -> list[Message]:
    messages = []
    if rng.random() < 0.2:
        manners = rng.sample(_MANNERS, 2)
        text = rng.choice(_SYSTEM).format(w=rng.choice(_WHO), m=manners[0], n=manners[1])
        messages.append({"role": "system", "content": text})
    for exchange in exchanges:
        for user, assistant in exchange.turns:
            messages.append({"role": "user", "content": _styled(rng, user) if exchange.casual else user})
            messages.append({"role": "assistant", "content": assistant})
    return messages


def _styled(rng: Random, text: str) -> str:
    """`text` as people type: now and then without capitals, without its mark, or with a please."""
    if text.endswith("?") and rng.random() < 0.1:
        text = text[:-1] + " please?" if rng.random() < 0.3 else text[:-1]
    elif text.endswith(".") and rng.random() < 0.1:
        text = text[:-1]
    return text.lower() if rng.random() < 0.12 else text
