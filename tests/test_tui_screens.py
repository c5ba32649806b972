"""The other screens and panels: adapters, chats; faults; looks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input, OptionList

from edgetune.chat import Node, Tree
from edgetune.engine.generation import LlamaGeneration
from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import ResourceError
from edgetune.library import register
from edgetune.tui.chat import ChatScreen
from edgetune.tui.controls import ControlList
from edgetune.tui.dialogs import AskDialog, LineDialog
from edgetune.tui.sessions import SessionsScreen
from edgetune.tui.themes import DARK, LIGHT
from tests.tui_pilot import ENDLESS, adapter_for, chat_app, pocket_gguf, screen_styles, screen_text

pytestmark = pytest.mark.asyncio

EVERYWHERE = (
    ["ctrl+s"],
    ["ctrl+l"],
    ["ctrl+t"],
    ["escape", "ctrl+up", "t", "right", "down"],
    ["escape", "ctrl+b"],
    ["escape", "f1"],
    ["escape", "ctrl+o"],
    ["escape", "ctrl+g"],
    ["escape", "f8"],
    ["escape", "f9"],
)
"""Keys that lead through every screen and panel."""

INTO_MESSAGES: tuple[list[str], ...] = (
    [],
    ["ctrl+s"],
    ["ctrl+up", "up", "down", "o"],
    ["t", "down"],
    ["escape", "ctrl+b"],
    ["escape", "e"],
    ["escape", "escape"],
)
STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202e\ud800 end"


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_gguf(tmp_path_factory.mktemp("pocket"))


# -- adapters


async def test_adapters_that_fit_are_listed_switched_and_scaled(tmp_path: Path) -> None:
    register(adapter_for(tmp_path / "tuned.gguf"))
    register(adapter_for(tmp_path / "other.gguf"))
    register(adapter_for(tmp_path / "foreign.gguf", seed=1))
    async with chat_app(max_tokens=4) as driver:
        await driver.press("ctrl+l")
        controls = driver.screen.side.query_one("#adapters", ControlList)
        await driver.until(lambda: len(controls.controls) == 2)
        assert [control.label for control in controls.controls] == ["other", "tuned"]
        assert len(controls.switched_off) == 2
        await driver.press("down", "space")
        await driver.idle()
        engine = driver.chat.session.engine
        assert [(one.path.name, one.scale) for one in engine.adapters] == [("tuned.gguf", 1.0)]
        assert "tuned" in driver.screen.status.status.adapters
        await driver.press("left", "left")
        await driver.idle()
        assert engine.adapters[0].scale == pytest.approx(0.9)
        await driver.press("minus", "2", "enter", "up", "space")
        await driver.idle()
        assert {one.path.name: one.scale for one in engine.adapters} == {"tuned.gguf": -2.0, "other.gguf": 1.0}
        await driver.press("space")
        await driver.idle()
        assert {one.path.name: one.scale for one in engine.adapters} == {"tuned.gguf": -2.0, "other.gguf": 0.0}


async def test_an_adapter_takes_hold_in_the_middle_of_a_reply(tmp_path: Path) -> None:
    register(adapter_for(tmp_path / "tuned.gguf"))
    async with chat_app(sampling=ENDLESS, max_tokens=900) as driver:
        await driver.press("ctrl+l")
        controls = driver.screen.side.query_one("#adapters", ControlList)
        await driver.until(lambda: len(controls.controls) == 1)
        driver.screen.composer.entry.focus()
        await driver.type("hello\n")
        await driver.running()
        controls.focus()
        await driver.until(lambda: controls.has_focus)
        engine = driver.chat.session.engine
        await driver.press("space", "left", "left")
        await driver.until(lambda: [one.scale for one in engine.adapters] == [pytest.approx(0.9)])
        assert driver.screen.run_now is not None
        (reply,) = driver.screen.run_now.replies
        generation = reply.generation
        assert isinstance(generation, LlamaGeneration)
        await driver.until(lambda: generation.adapters and generation.slot)
        await driver.running(len(generation.ids) + 3)
        assert "tuned 0.9" in driver.screen.status.status.adapters
        await driver.press("escape", "escape")
        await driver.idle()
        node = driver.tree.path()[-1]
        assert node.meta["finish_reason"] == "interrupted"
        assert [one["scale"] for one in node.meta["adapters"]] == [pytest.approx(0.9)]


async def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    foreign = adapter_for(tmp_path / "foreign.gguf", seed=1)
    async with chat_app(max_tokens=2) as driver:
        await driver.press("ctrl+l", "a")
        (await driver.opens(LineDialog)).query_one(Input).value = str(foreign)
        await driver.press("enter")
        await driver.until(lambda: "was trained on" in driver.told)
        assert not driver.chat.session.engine.adapters
        driver.screen.composer.entry.focus()
        await driver.settle()
        await driver.say("still here")
        assert len(driver.tree.path()) == 2


# -- chats


async def test_chats_are_found_renamed_exported_deleted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with chat_app(max_tokens=4) as driver:
        await driver.say("tell me of whales")
        await driver.press("ctrl+n")
        await driver.idle()
        await driver.say("tell me of herrings")
        await driver.press("ctrl+o")
        shown = (await driver.opens(SessionsScreen)).query_one(OptionList)
        assert shown.option_count == 2
        assert "tell me of whales" in screen_text(driver.app)
        await driver.type("whales")
        await driver.until(lambda: shown.option_count == 1)
        assert "tell me of herrings" not in screen_text(driver.app)
        await driver.press("ctrl+r")
        (await driver.opens(LineDialog)).query_one(Input).value = "Big ones"
        await driver.press("enter")
        await driver.until(lambda: "Big ones" in screen_text(driver.app))
        await driver.press("ctrl+e")
        (await driver.opens(LineDialog)).query_one(Input).value = "whales.md"
        await driver.press("enter")
        await driver.until((tmp_path / "whales.md").exists)
        assert "tell me of whales" in (tmp_path / "whales.md").read_text(encoding="utf-8")
        await driver.opens(SessionsScreen)
        await driver.press("enter")
        await driver.opens(ChatScreen)
        await driver.until(lambda: driver.tree.path()[0].content == "tell me of whales")
        await driver.idle()
        assert "Resumed: Big ones" in driver.text()
        await driver.press("ctrl+o")
        await driver.opens(SessionsScreen)
        sessions = driver.chat.database.sessions()
        other = next(number for number, one in enumerate(sessions) if one.title == "tell me of herrings")
        await driver.press(*["down"] * other, "ctrl+x")
        await driver.opens(AskDialog)
        await driver.press("y")
        await driver.until(lambda: len(driver.chat.database.sessions()) == 1)
        assert driver.chat.database.sessions()[0].title == "Big ones"


async def test_whatever_is_typed_over_the_chats_is_searched_for() -> None:
    async with chat_app(max_tokens=2) as driver:
        for text in ("first", "second", "third"):
            await driver.say(text)
            await driver.press("ctrl+n")
            await driver.until(lambda: driver.tree.head is None)
        await driver.press("ctrl+o")
        await driver.opens(SessionsScreen)
        shown, search = driver.app.screen.query_one(OptionList), driver.app.screen.query_one(Input)
        await driver.type("/red?")
        await driver.until(lambda: search.value == "/red?")
        assert isinstance(driver.app.screen, SessionsScreen)
        assert len(driver.chat.database.sessions()) == 3
        await driver.press("ctrl+u", "tab", "down", "pagedown", "up")
        await driver.until(lambda: shown.option_count == 3)
        assert search.has_focus
        assert shown.highlighted == 1
        await driver.press("enter")
        await driver.until(lambda: driver.tree.path() and driver.tree.path()[0].content == "second")


# -- faults


async def test_a_model_file_that_goes_away_is_told_and_survived(pocket: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(pocket.read_bytes())
    async with chat_app(copy, max_tokens=4) as driver:
        await driver.say("hello")
        copy.unlink()
        driver.screen._check_model()
        assert "gone" in driver.screen.status.status.warning
        await driver.say("and now")
        assert len(driver.tree.path()) == 4
        await driver.type("/lora nothing\n")
        await driver.idle()
        copy.write_bytes(b"another one")
        driver.screen._check_model()
        assert "another" in driver.screen.status.status.warning


async def test_a_full_disk_is_told_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with chat_app(max_tokens=4) as driver:
        database = driver.chat.database
        save = database.save

        def full(*_: Any, **__: Any) -> None:
            raise ResourceError("The disk is full: chats.sqlite was not written.", hint="Free some space.")

        monkeypatch.setattr(database, "save", full)
        await driver.say("hello")
        assert "not saved" in driver.screen.status.status.warning
        assert "The disk is full" in driver.told
        monkeypatch.setattr(database, "save", save)
        await driver.say("again")
        assert driver.screen.status.status.warning == ""
        assert len(database.load(driver.chat.saving.session_id).nodes) == 4


async def test_a_message_that_does_not_fit_the_context_stays_in_the_input() -> None:
    async with chat_app(max_tokens=4, ctx_size=256) as driver:
        await driver.say("hello")
        long = "word " * 400
        await driver.type("x\n")
        await driver.idle()
        driver.screen.composer.put(long)
        await driver.settle()
        await driver.press("enter")
        await driver.until(lambda: "the context has" in driver.told)
        assert driver.typed == long
        assert len(driver.tree.path()) == 4


async def test_what_leaves_the_context_is_told_before_and_after() -> None:
    async with chat_app(max_tokens=20, ctx_size=256, sampling=Sampling(temp=0, ignore_eos=True)) as driver:
        for number in range(12):
            await driver.say(f"This is message number {number}." + " And more." * (number % 3))
            if "drops the oldest" in driver.screen.status.status.warning:
                break
        else:
            raise AssertionError("the context never filled")
        await driver.say("One more message that goes over.")
        assert "The context is full: the oldest" in driver.transcript.notices[-1].text


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (80, 24), (200, 60)])
async def test_every_screen_survives_every_size(pocket: Path, size: tuple[int, int]) -> None:
    async with chat_app(pocket, max_tokens=6, size=(80, 24)) as driver:
        await driver.say("hello there")
        await driver.pilot.resize_terminal(*size)
        await driver.settle()
        for keys in EVERYWHERE:
            await driver.press(*keys)
            await driver.settle()
            driver.app.export_screenshot()
        await driver.press("escape")
        await driver.pilot.resize_terminal(80, 24)
        await driver.settle()
        await driver.idle()
        assert "hello there" in driver.text()


async def test_the_end_stays_in_view_when_the_window_shrinks() -> None:
    async with chat_app(max_tokens=40, sampling=Sampling(temp=0, ignore_eos=True)) as driver:
        await driver.say("hello")
        await driver.say("once more")
        await driver.pilot.resize_terminal(30, 8)
        await driver.settle()
        transcript = driver.transcript
        assert transcript.scroll_offset.y == transcript.max_scroll_y > 0
        transcript.focus()
        await driver.settle()
        await driver.press("home")
        await driver.settle()
        assert transcript.scroll_offset.y == 0


# -- what a model, a file or a person says cannot steer the terminal


def hostile_tree() -> Tree:
    tree = Tree()
    question = tree.add(Node("user", f"ask {HOSTILE}"))
    text = f"say {HOSTILE}\n\n```py{HOSTILE}\n{HOSTILE}\n```\n\n[{HOSTILE}](http://{HOSTILE.strip()})"
    choice = TokenChoice(5, 0, len(text), 0.5, 0.5, (Candidate(5, HOSTILE, 0.5, 0.5), Candidate(6, HOSTILE, 0.4, 0.0)))
    meta = {"reasoning": HOSTILE, "raw": text, "finish_reason": "stop"}
    tree.add(Node("assistant", text, parent=question.id, ids=(5,), choices=[choice], meta=meta))
    tree.add(Node("assistant", HOSTILE, parent=question.id))
    tree.select(tree.siblings(next(reversed(tree.nodes)))[0].id)
    return tree


async def test_nothing_hostile_reaches_the_terminal() -> None:
    async with chat_app(max_tokens=2, tree=hostile_tree(), size=(120, 40)) as driver:
        seen = ""
        for keys in INTO_MESSAGES:
            await driver.press(*keys)
            await driver.settle()
            for text, _ in screen_styles(driver.app):
                assert not any(
                    ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or 0xD800 <= ord(char) < 0xE000 for char in text
                )
                assert "\u202e" not in text
                seen += text
        assert "␛[2J" in seen
        driver.app.say(HOSTILE, hint=HOSTILE)
        driver.screen._note(HOSTILE)
        await driver.settle()
        assert "\x1b" not in "".join(text for text, _ in screen_styles(driver.app))


# -- looks


async def test_no_color_draws_no_color(monkeypatch: pytest.MonkeyPatch, pocket: Path) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with chat_app(pocket, max_tokens=8) as driver:
        await driver.say("hello there")
        await driver.press("ctrl+t", "ctrl+s", "ctrl+up", "t")
        await driver.settle()
        styles = [style for _, style in screen_styles(driver.app) if style is not None]
        assert all(color.is_default for style in styles for color in (style.color, style.bgcolor) if color is not None)
        assert any(style.reverse for style in styles)


async def test_a_theme_is_kept_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORFGBG", "0;15")
    async with chat_app(max_tokens=2) as driver:
        assert driver.app.theme == LIGHT.name
        driver.app.theme = "nord"
        await driver.settle()
    async with chat_app(max_tokens=2) as driver:
        assert driver.app.theme == "nord"


async def test_a_theme_nobody_chose_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with chat_app(max_tokens=2):
        pass
    monkeypatch.delenv("NO_COLOR")
    for background, theme in (("15;0", DARK), ("0;15", LIGHT)):
        monkeypatch.setenv("COLORFGBG", background)
        async with chat_app(max_tokens=2) as driver:
            assert driver.app.theme == theme.name
