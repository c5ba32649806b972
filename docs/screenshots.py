"""Draws the README's pictures of the chat: the embedded model, asked and looked at by keys, as SVG.

    python -m docs.screenshots

Converts the model into a temporary directory, runs the app without a terminal, and writes docs/screenshots/*.svg.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from edgetune.chat import open_session
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.engine.sampling import Sampling
from edgetune.export import export_base
from edgetune.library import embedded_model_dir
from edgetune.tui.app import EdgetuneApp
from edgetune.tui.chat import ChatScreen
from edgetune.tui.compare import CompareScreen

HERE = Path(__file__).resolve().parent / "screenshots"
_SIZE = (100, 30)
_QUESTIONS = ("What is the capital of France?", "Tell me about the sun.")
_PATIENCE_S = 120.0


def main() -> None:
    """Draw them all."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["EDGETUNE_HOME"] = home
        os.environ.pop("NO_COLOR", None)
        model = Path(home) / "pocket.gguf"
        export_base(embedded_model_dir(), model, sink=lambda event: None)
        HERE.mkdir(exist_ok=True)
        asyncio.run(_draw(model))


async def _draw(model: Path) -> None:
    def opening() -> tuple[OpenChat, Outcome]:
        session = open_session(model, ctx_size=1024)
        return OpenChat(session, session.converse(sampling=Sampling(seed=7, temp=1.1), max_tokens=60)), Outcome()

    app = EdgetuneApp()
    app.first_screen = lambda: app.chat_screen(opening, title="pocket", is_first=True)
    async with app.run_test(size=_SIZE) as pilot:
        await _until(lambda: isinstance(app.screen, ChatScreen))
        await _idle(app, pilot)
        for question in _QUESTIONS:
            await _say(app, pilot, question)
        await pilot.press("ctrl+s", "down")
        await _idle(app, pilot)
        _save(app, "chat")
        await pilot.press("ctrl+s", "ctrl+up", "t", *["right"] * 3, "down")
        await _idle(app, pilot)
        _save(app, "tokens")
        await pilot.press("escape", "escape", "ctrl+g")
        await pilot.pause()
        await _say(app, pilot, "Write three words about rain.")
        _save(app, "compare")
        await pilot.press("escape")
        await _until(lambda: isinstance(app.screen, ChatScreen))
        await pilot.press("ctrl+d")
        await _until(lambda: not app.is_running)
    app.engine_worker.close()


async def _say(app: EdgetuneApp, pilot: Pilot[None], text: str) -> None:
    names = {" ": "space", "?": "question_mark", ".": "full_stop"}
    await pilot.press(*(names.get(char, char) for char in text), "enter")
    await _idle(app, pilot)


async def _idle(app: EdgetuneApp, pilot: Pilot[None]) -> None:
    await pilot.pause()
    screen = app.screen
    await _until(
        lambda: (
            not app.engine_worker.is_busy
            and not (isinstance(screen, ChatScreen | CompareScreen) and screen.run_now is not None)
        )
    )
    await pilot.pause()


async def _until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the screen did not become what it should be")
        await asyncio.sleep(0.02)


def _save(app: EdgetuneApp, name: str) -> None:
    (HERE / f"{name}.svg").write_text(app.export_screenshot(title="edgetune chat"), encoding="utf-8")


if __name__ == "__main__":
    main()
