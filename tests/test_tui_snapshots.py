"""Every screen as it was when somebody last looked at it: SVG files with the place and colours of all that is shown.

`EDGETUNE_SNAPSHOTS=write pytest tests/test_tui_snapshots.py` writes them anew; look at what changed before it is kept.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from threading import Event as Signal
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from rich.style import Style
from textual.widgets import Input

from edgetune.chat import Node
from edgetune.chat.database import ChatDatabase, SavedSession
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.reply import Reply
from edgetune.cli.home import open_chat
from edgetune.engine.protocol import Timings
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.events import Event, Metrics, Notice, Progress
from edgetune.library import Entry
from edgetune.paths import write_json
from edgetune.tui.app import EdgetuneApp
from edgetune.tui.home import HomeScreen
from edgetune.tui.stages import Stage, StageEnd
from edgetune.tui.themes import DARK, LIGHT
from tests.gguf_files import write_adapter, write_model
from tests.ggufs import base_gguf
from tests.tui_pilot import Driver, chat_app, spoken, write_run
from tests.tui_svg import look, screen_svg

HERE = Path(__file__).resolve().parent / "tui_snapshots"
IS_WRITING = os.environ.get("EDGETUNE_SNAPSHOTS") == "write"
_PATIENCE_S = 30.0
_LOW, _WIDE = (20, 5), (100, 30)
_NEW_YEAR = 1767225600.0
_SAYS = Sampling(temp=0, grammar='root ::= "The sea is wide and deep."')
"""Whatever the model thinks, this is what it says."""
_TRAINING: list[Event] = [
    *(Metrics(at, {"loss": 3 - at / 12, "lr": 1e-4, "tokens_per_second": 1234.0}) for at in range(1, 30)),
    Metrics(0, {"loss": 3.0}, split="valid"),
    Metrics(29, {"loss": 0.6}, split="valid"),
    Notice("Two rows were left out: they are empty.", "warning"),
    Progress("train", 29, 60, "steps"),
]
_MADE = StageEnd(0, "tickets/adapter-F16.gguf")
_FAILED = StageEnd(2, "", "The base /models/base is gone.", "Name where it is now: edgetune convert tickets --base DIR")

Act = Callable[[Driver], Awaitable[None]]
Opening = Callable[[], AbstractAsyncContextManager[EdgetuneApp]]


def keys(*names: str, text: str = "") -> Act:
    async def act(driver: Driver) -> None:
        await driver.press(*names)
        await driver.settle()
        await driver.type(text)

    return act


async def ask(driver: Driver) -> None:
    await driver.say("What is the sea like?")


async def ask_both(driver: Driver) -> None:
    await driver.press("ctrl+g")
    await driver.settle()
    await driver.type("What is the sea like?\n")


async def stay_in_the_middle(driver: Driver) -> None:
    """A reply that says nothing more, until it is stopped."""
    engine, screen = driver.chat.session.engine, driver.screen
    evaluate = engine.evaluate

    def wait(generations: object) -> None:
        while (run := screen.run_now) and run.replies and len(run.replies[0].generation.ids) > 9:
            if run.is_cancelled:
                break
            time.sleep(0.01)
        evaluate(generations)  # type: ignore[arg-type]

    engine.evaluate = wait  # type: ignore[method-assign]
    await driver.type("What is the sea like?\n")
    await driver.running(10)


_look_only = keys()


def chat(act: Act = _look_only, *, size: tuple[int, int] = (80, 24), is_spoken: bool = True, chats: int = 0) -> Opening:
    """The chat, whether something was said in it or not, with so many others beside it."""

    @asynccontextmanager
    async def opening() -> AsyncIterator[EdgetuneApp]:
        for number in range(chats):
            said = Node("user", f"Tell me of {('whales', 'herrings', 'squid')[number]}.")
            kept = SavedSession(f"{number}" * 8, said.content, "/models/sea.gguf")
            ChatDatabase().save(kept, [said], head=said.id)
        tree = spoken() if is_spoken else None
        # The tests' own file is called by how many others were made before it.
        model = Path("sea-F32.gguf")
        shutil.copyfile(base_gguf(), model)
        async with chat_app(model, size=size, tree=tree, sampling=_SAYS, max_tokens=40) as driver:
            await act(driver)
            yield driver.app

    return opening


def home(*pressed: str, at: str = "pocket", size: tuple[int, int] = (80, 24), end: StageEnd | None = None) -> Opening:
    """The home screen with the cursor on `at`; what runs there has told what training tells, and perhaps ended."""

    class Told(Stage):
        async def run(self, sink: Callable[[Event], None]) -> StageEnd:
            for event in _TRAINING if end is None else ():
                sink(event)
            if end is None:
                await asyncio.Event().wait()
            return end or _FAILED

    @asynccontextmanager
    async def opening() -> AsyncIterator[EdgetuneApp]:
        entries = _library()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgetune.tui.home.list_entries", lambda: entries)
            patch.setattr("edgetune.tui.home.Stage", Told)
            app = EdgetuneApp(lambda: HomeScreen(open_chat))
            async with app.run_test(size=size) as pilot:
                screen = app.screen
                assert isinstance(screen, HomeScreen)
                while screen.chosen is None:
                    await asyncio.sleep(0.01)
                await pilot.press(*["down"] * [entry.name for entry in entries].index(at))
                await pilot.press(*pressed)
                yield app
        app.engine_worker.close()

    return opening


def _library() -> list[Entry]:
    """One of each kind, in the working directory."""
    Path("pocket").mkdir(exist_ok=True)
    write_json(Path("pocket/config.json"), {"architectures": ["LlamaForCausalLM"]})
    for name in ("tickets", "cut"):
        if not Path(name).exists():
            write_run(Path(name), finished=name == "tickets")
    return [
        Entry("pocket", Path("pocket"), "checkpoint", _NEW_YEAR, embedded=True),
        Entry("tiny-F32", write_model(Path("tiny-F32.gguf")), "model", _NEW_YEAR),
        Entry("polite", write_adapter(Path("polite.gguf")), "adapter", _NEW_YEAR),
        Entry("tickets", Path("tickets"), "run", _NEW_YEAR),
        Entry("cut", Path("cut"), "run", _NEW_YEAR),
    ]


@asynccontextmanager
async def loading() -> AsyncIterator[EdgetuneApp]:
    """A model that takes its time."""
    loaded = Signal()

    def opening() -> tuple[OpenChat, Outcome]:
        loaded.wait(_PATIENCE_S * 10)
        raise UsageError("It was not loaded.")

    app = EdgetuneApp()
    app.animation_level = "none"
    app.first_screen = lambda: app.chat_screen(opening, title="sea-Q4_K_M", is_first=False)
    async with app.run_test(size=(80, 24)):
        yield app
        loaded.set()
    app.engine_worker.close()


SCREENS: dict[str, Opening] = {
    "home": home(),
    "home-run": home(at="tickets"),
    "home-training": home("t", at="cut"),
    "home-made": home("g", at="tickets", end=_MADE),
    "home-failed": home("g", at="tickets", end=_FAILED),
    "home-question": home("u", at="tiny-F32"),
    "home-20x5": home(size=_LOW),
    "loading": loading,
    "welcome": chat(is_spoken=False),
    "reply": chat(stay_in_the_middle, is_spoken=False),
    "answered": chat(ask, is_spoken=False),
    "conversation": chat(),
    "conversation-20x5": chat(size=_LOW),
    "sampling": chat(keys("ctrl+s", "down"), size=_WIDE),
    "sampling-20x5": chat(keys("ctrl+s", "down"), size=_LOW),
    "plot": chat(keys("ctrl+up", "t", "right", "right", "right", "ctrl+s"), size=_WIDE),
    "adapters": chat(keys("ctrl+l"), size=_WIDE),
    "tokens": chat(keys("ctrl+up", "t", "right", "right", "right", "down")),
    "tokens-20x5": chat(keys("ctrl+up", "t", "right"), size=_LOW),
    "branches": chat(keys("ctrl+b")),
    "completion": chat(keys(text="/ex")),
    "keys": chat(keys("f1")),
    "palette": chat(keys("ctrl+p", text="adapters")),
    "compare": chat(keys("ctrl+g"), size=_WIDE),
    "compared": chat(ask_both, size=_WIDE),
    "compare-20x5": chat(ask_both, size=_LOW),
    "chats": chat(keys("ctrl+o"), chats=3),
    "system": chat(keys("f8", text="Be brief.")),
    "templates": chat(keys("f9")),
    "template": chat(keys("f9", "n", text="sum")),
}


@pytest.fixture(autouse=True)
def _still(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clocks that stand, and nothing of this machine's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    if hasattr(time, "tzset"):
        time.tzset()
    monkeypatch.setattr("edgetune.chat.database._now", lambda: "2026-01-01T00:00:00.000+00:00")
    monkeypatch.setattr("edgetune.tui.loading.time", SimpleNamespace(monotonic=lambda: 0.0))
    monkeypatch.setattr(Reply, "timings", property(_timings))
    monkeypatch.delenv("NO_COLOR", raising=False)


def _timings(reply: Reply) -> Timings:
    """As many tokens as there are, at 20 a second."""
    count = len(reply.generation.ids)
    return Timings(reply.generation.timings.prompt_tokens, 0, 0.2, count, max(count - 1, 0) / 20, 0.25)


async def _check(app: EdgetuneApp, path: Path) -> None:
    """Wait until `app` shows what is in `path`; or write there what it shows as soon as that stays."""
    for entry in app.screen.query(Input):
        entry.cursor_blink = False
    if IS_WRITING:
        before = ""
        while before != (before := screen_svg(app)):
            await asyncio.sleep(0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before, encoding="utf-8")
    wanted, end = path.read_text(encoding="utf-8"), time.monotonic() + _PATIENCE_S
    while (now := screen_svg(app)) != wanted and time.monotonic() < end:
        await asyncio.sleep(0.02)
    assert now == wanted, path


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SCREENS)
async def test_a_screen_looks_as_it_did(name: str) -> None:
    async with SCREENS[name]() as app:
        for theme in (DARK, LIGHT):
            app.theme = theme.name
            await _check(app, HERE / ("light" if theme is LIGHT else "dark") / f"{name}.svg")


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SCREENS)
async def test_a_screen_looks_as_it_did_without_colours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with SCREENS[name]() as app:
        await _check(app, HERE / "no-colour" / f"{name}.svg")


def test_a_snapshot_is_a_picture_of_its_own() -> None:
    files = sorted(HERE.rglob("*.svg"))
    assert len(files) == 3 * len(SCREENS)
    for file in files:
        picture = ElementTree.parse(file).getroot()
        assert picture.tag == "{http://www.w3.org/2000/svg}svg"
        assert not any("href" in name for one in picture.iter() for name in one.attrib), file
        assert len({one.get("fill") for one in picture.iter()}) > 2, file


def test_another_colour_is_seen() -> None:
    style = Style(color="#ff0000", bold=True)
    assert look(style) != look(style + Style(color="#fe0000"))
    assert look(style) != look(style + Style(bgcolor="#000001"))
    assert look(style) != look(style + Style(reverse=True))
    assert look(style) == look(style + Style(meta={"token": 3}, italic=False))
