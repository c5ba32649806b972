"""The chat screen on a real model, driven by keys."""

from __future__ import annotations

import asyncio
import builtins
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from textual import events
from textual.message_pump import MessagePump
from textual.pilot import Pilot
from textual.screen import Screen

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.chat import Node, Tree, open_session
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import Candidate, LoraSpec, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.paths import write_json
from edgetune.tui.app import EdgetuneApp
from edgetune.tui.chat import ChatScreen
from edgetune.tui.transcript import Transcript
from tests.gguf_files import BASE
from tests.ggufs import QUERY, base_gguf, checkpoint, write_lora

ENDLESS = Sampling(temp=0.8, seed=3, ignore_eos=True)
"""For replies that are stopped."""
_PATIENCE_S = 120.0
_WORDS = ("The", " sea", " is", " wide", " and", " **deep**", ".", "\n\n", "- salt", "\n- waves", "\n\n", "```python\n",
          "depth = 11", "\n", "```")  # fmt: skip
_CHANCES = (0.93, 0.61, 0.97, 0.22, 0.8, 0.05, 0.99, 0.7, 0.3, 0.9, 0.99, 0.98, 0.4, 0.99, 0.99)
_MOST_ROUNDS = 100
_CHARS = {
    "enter": "\r", "space": " ", "question_mark": "?", "full_stop": ".", "slash": "/", "at": "@", "minus": "-",
    "plus": "+", "comma": ",", "tab": "\t",
}  # fmt: skip
_NAMES = {char: name for name, char in _CHARS.items()} | {"\n": "enter"}
AnyScreen = TypeVar("AnyScreen", bound=Screen[Any])


@lru_cache(1)
def pocket_gguf(directory: Path) -> Path:
    """The embedded model as a GGUF in `directory`; made once."""
    from edgetune.export import export_base
    from edgetune.library import embedded_model_dir

    path = directory / "pocket.gguf"
    export_base(embedded_model_dir(), path, sink=lambda event: None)
    return path


def adapter_for(path: Path, *, seed: int = 0) -> Path:
    """An adapter for the base of that seed."""
    return write_lora(path, QUERY, metadata=fingerprint_checkpoint(checkpoint(seed=seed)).to_metadata())


@dataclass
class Hands:
    """Whoever sits at the app: presses keys, and waits for what comes of them.

    Textual's own pilot takes a process that gets no processor for one that has nothing left to do; here a key is done
    when no message waits anywhere.
    """

    app: EdgetuneApp
    pilot: Pilot[None]

    async def press(self, *keys: str) -> None:
        """Press keys, each when the one before has done what it does."""
        for key in keys:
            self.app.post_message(events.Key(key, _CHARS.get(key, key if len(key) == 1 else None)))
            await self.settle()

    async def type(self, text: str) -> None:
        """Type into what has the focus, as fast as a burst of bytes comes."""
        for char in text:
            self.app.post_message(events.Key(_NAMES.get(char, char), _CHARS.get(_NAMES.get(char, char), char)))
        await self.settle()

    async def until(self, holds: Callable[[], Any]) -> None:
        """Wait for `holds`."""
        end = time.monotonic() + _PATIENCE_S
        while not holds():
            if self.app._exception is not None:
                raise self.app._exception
            assert time.monotonic() < end, f"waited in vain; the screen:\n{self.text()}"
            await asyncio.sleep(0.01)
        await self.settle()

    async def opens(self, kind: builtins.type[AnyScreen]) -> AnyScreen:
        """Wait until a screen of this kind is there to be typed into, and return it."""
        await self.until(lambda: isinstance(self.app.screen, kind))
        screen = self.app.screen
        assert isinstance(screen, kind)
        await self.until(lambda: screen.focused is not None or not screen.focus_chain)
        return screen

    async def settle(self) -> None:
        """Wait until no message waits, here or in any widget; and draw."""
        quiet = 0
        for _ in range(_MOST_ROUNDS):
            quiet = quiet + 1 if await self._is_quiet() else 0
            if quiet == 2 or not self.app.is_running:
                break
        if self.app.is_running and self.app.screen_stack:
            self.app.screen._on_timer_update()

    async def _is_quiet(self) -> bool:
        """Let everybody do what there is to do; whether nothing came of it that is yet to be done."""
        screens = self.app.screen_stack if self.app.is_running else []
        nodes = [self.app, *(node for screen in screens for node in screen.walk_children(with_self=True))]
        waiting: set[MessagePump] = set()

        def done(node: MessagePump) -> None:
            waiting.discard(node)

        for node in nodes:
            if node.call_later(done, node):
                waiting.add(node)
        # What is on its way out does nothing any more.
        while any(node.is_running for node in waiting) and self.app._exception is None:
            await asyncio.sleep(0.001)
        return not any(node.message_queue_size for node in nodes)

    @property
    def told(self) -> str:
        """The messages that were shown for a while."""
        return "\n".join(f"{one.title}\n{one.message}" for one in self.app._notifications)

    def text(self) -> str:
        """What is on the screen."""
        return screen_text(self.app)


@dataclass
class Driver(Hands):
    """Whoever sits at a chat."""

    chat: OpenChat

    @property
    def screen(self) -> ChatScreen:
        """The chat's screen, also under a dialog."""
        return next(screen for screen in self.app.screen_stack if isinstance(screen, ChatScreen))

    @property
    def tree(self) -> Tree:
        return self.chat.conversation.tree

    @property
    def transcript(self) -> Transcript:
        return self.screen.transcript

    @property
    def typed(self) -> str:
        return self.screen.composer.entry.text

    async def idle(self) -> None:
        """Wait until nothing is being made, and what came of it is shown."""
        await self.settle()
        while not self._is_idle():
            await self.until(self._is_idle)

    def _is_idle(self) -> bool:
        # Over the chat, a worker may wait for the answer of a dialog.
        is_over = self.app.screen is not self.screen
        is_working = any(not one.is_finished for one in self.app.workers if not is_over or one.group == "look ahead")
        return self.screen.run_now is None and not self.app.engine_worker.is_busy and not is_working

    async def say(self, text: str) -> Node:
        """Send a message and wait for the reply."""
        before = len(self.tree.nodes)
        await self.type(f"{text}\n")
        await self.until(lambda: len(self.tree.nodes) > before)
        await self.idle()
        return self.tree.path()[-1]

    async def running(self, tokens: int = 3) -> None:
        """Wait until a reply has so many tokens."""
        await self.until(
            lambda: (run := self.screen.run_now) and run.replies and len(run.replies[0].generation.ids) >= tokens
        )


def screen_text(app: EdgetuneApp) -> str:
    """The characters of the screen, line by line."""
    lines = app.screen._compositor.render_strips(app.size)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)


def styled_lines(app: EdgetuneApp) -> list[list[tuple[str, Any]]]:
    """(text, style) of what is on each line of the screen, as the terminal would get it."""
    filters = app.get_line_filters()
    lines = []
    for line in app.screen._compositor.render_strips(app.size):
        strip = line
        for one in filters:
            strip = strip.apply_filter(one, app.screen.background_colors[1])
        lines.append([(segment.text, segment.style) for segment in strip.simplify()])
    return lines


def screen_styles(app: EdgetuneApp) -> list[tuple[str, Any]]:
    """(text, style) of every segment on the screen, as the terminal would get it."""
    return [one for line in styled_lines(app) for one in line]


def _slow_down(engine: LlamaEngine) -> None:
    """Let each step take some milliseconds: a reply that is to be stopped must not end before that."""
    evaluate = engine.evaluate

    def evaluate_slowly(generations: Sequence[LlamaGeneration]) -> None:
        time.sleep(0.02)
        evaluate(generations)

    engine.evaluate = evaluate_slowly  # type: ignore[method-assign]


@asynccontextmanager
async def chat_app(
    gguf: Path | None = None,
    *,
    size: tuple[int, int] = (100, 30),
    sampling: Sampling | None = None,
    max_tokens: int = 24,
    lora: Sequence[LoraSpec] = (),
    tree: Tree | None = None,
    ctx_size: int = 1024,
    first: Outcome | None = None,
) -> AsyncIterator[Driver]:
    """The app with an open chat; a small model with random weights unless `gguf` names another."""
    opened: list[OpenChat] = []
    model = gguf or base_gguf()

    def opening() -> tuple[OpenChat, Outcome]:
        session = open_session(model, threads=1, ctx_size=ctx_size, lora=lora)
        if sampling is ENDLESS:
            _slow_down(session.engine)
        conversation = session.converse(sampling=sampling or Sampling(seed=3), max_tokens=max_tokens, tree=tree)
        opened.append(OpenChat(session, conversation))
        return opened[0], first or Outcome()

    app = EdgetuneApp()
    app.first_screen = lambda: app.chat_screen(opening, title="pocket", is_first=True)
    async with app.run_test(size=size, notifications=True) as pilot:
        end = time.monotonic() + _PATIENCE_S
        while not isinstance(app.screen, ChatScreen) or not app.screen.is_mounted:
            if app.failure is not None:
                raise app.failure
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        driver = Driver(app, pilot, opened[0])
        await driver.idle()
        screen = driver.screen
        yield driver
        if app.is_running:
            if screen.run_now is not None:
                screen.run_now.cancel()
            await driver.idle()
            screen.action_leave()
            await driver.until(lambda: not app.is_running)
    app.engine_worker.close()
    if app.failure is not None:
        raise app.failure


def spoken() -> Tree:
    """A question, three answers to it, one of them voted for, all with their tokens."""
    tree = Tree()
    question = tree.add(Node("user", "What is the sea like?", created="2026-01-01T00:00:00.000+00:00"))
    tree.add(Node("assistant", "Wet.", parent=question.id))
    tree.add(Node("assistant", _text(), parent=question.id, ids=_ids(), choices=_choices(), meta={"vote": "up"}))
    tree.add(Node("assistant", "Blue, mostly.", parent=question.id))
    tree.select(tree.siblings(next(reversed(tree.nodes)))[1].id)
    return tree


def _text() -> str:
    return "".join(_WORDS)


def _ids() -> tuple[int, ...]:
    return tuple(range(1, len(_WORDS) + 1))


def _choices() -> list[TokenChoice]:
    choices, at = [], 0
    for number, (word, chance) in enumerate(zip(_WORDS, _CHANCES, strict=True), 1):
        rest = (1 - chance) / 2
        others = (Candidate(200 + number, " blue", rest, rest / 2), Candidate(300 + number, " cold", rest / 2, 0.0))
        candidates = sorted(
            (Candidate(number, word, chance, min(1.0, chance * 1.1)), *others), key=lambda one: -one.probability
        )
        choices.append(TokenChoice(number, at, at + len(word), chance, min(1.0, chance * 1.1), tuple(candidates)))
        at += len(word)
    return choices


def write_run(path: Path, *, finished: bool = True, steps: int = 12, task: str = "chat") -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    made = Run(path, Path("/models/base"), "base", BASE, data={"paths": ["/data/rows.jsonl"]}, finished=finished)
    write_json(path / RUN_RECORD, replace(made, task=task, metrics={"step": steps}).record())
    lines = [json.dumps({"step": at, "split": "train", "loss": 4 - at / 10, "lr": 1e-4}) for at in range(steps)]
    lines += [json.dumps({"step": at, "split": "valid", "loss": loss}) for at, loss in ((0, 4.0), (steps, 3.0))]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 13, "split": "tr']))
    return path
