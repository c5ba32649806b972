"""Two settings side by side: their answers, their tokens, answering again, stopping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from textual.widgets import TextArea

from edgetune.chat.exports import preference_pairs
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.tui.chat import ChatScreen
from edgetune.tui.compare import CompareScreen
from edgetune.tui.controls import ControlList
from edgetune.tui.dialogs import LineDialog, TextDialog
from edgetune.tui.token_panel import TokenPanel
from tests.tui_pilot import ENDLESS, adapter_for, chat_app, pocket_gguf, screen_text

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_gguf(tmp_path_factory.mktemp("pocket"))


async def test_two_settings_answer_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = adapter_for(tmp_path / "tuned.gguf")
    async with chat_app(max_tokens=16, lora=[LoraSpec(adapter)], sampling=Sampling(temp=0, ignore_eos=True)) as driver:
        await driver.press("ctrl+g")
        screen = await driver.opens(CompareScreen)
        assert [setting.adapter for setting in screen.settings] == ["none", "as now"]
        await driver.type("hello\n")
        await driver.until(lambda: len(screen.nodes) == 2 and screen.run_now is None)
        left, right = screen.nodes
        assert left.meta["adapters"] == []
        assert [one["scale"] for one in right.meta["adapters"]] == [1.0]
        assert left.meta["sampling"]["seed"] == right.meta["sampling"]["seed"]
        assert len(left.ids) == len(right.ids) == 16
        assert left.ids != right.ids
        await driver.press("b")
        await driver.until(lambda: right.meta.get("vote") == "up")
        assert left.meta["vote"] == "down"
        await driver.press("s")
        await driver.opens(LineDialog)
        await driver.press("enter")
        await driver.until((tmp_path / "pairs.jsonl").exists)
        row = json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8"))
        assert row["chosen"][0]["content"] == right.content
        assert row["rejected"][0]["content"] == left.content
        await driver.press("e")
        (await driver.opens(TextDialog)).query_one(TextArea).text = "By hand."
        await driver.press("ctrl+s")
        await driver.until(lambda: len(screen.nodes) == 3)
        assert "By hand." in screen_text(driver.app)
        await driver.press("escape")
        await driver.opens(ChatScreen)
        assert "By hand." in driver.text()
        assert len(preference_pairs(driver.tree)) >= 2


async def test_each_side_has_its_own_settings(pocket: Path) -> None:
    async with chat_app(pocket, max_tokens=8) as driver:
        await driver.press("ctrl+g")
        screen = await driver.opens(CompareScreen)
        await driver.press("f2")
        settings = screen.query_one("#settings-0", ControlList)
        settings.cursor = next(number for number, one in enumerate(settings.controls) if one.name == "temp")
        await driver.type("1.5\n")
        assert screen.settings[0].sampling.temp == 1.5
        assert screen.settings[0].preset == "custom"
        await driver.press("f2")
        other = screen.query_one("#settings-1", ControlList)
        other.cursor = 2
        await driver.press("right")
        assert screen.settings[1].preset == "precise"
        assert screen.settings[1].sampling.temp == 0.2
        await driver.press("i")
        await driver.type("hello\n")
        await driver.until(lambda: len(screen.nodes) == 2 and screen.run_now is None)
        assert [node.meta["sampling"].get("temp") for node in screen.nodes] == [1.5, 0.2]
        assert driver.chat.conversation.sampling.temp == Sampling().temp


async def test_the_tokens_of_both_sides_can_be_inspected(pocket: Path) -> None:
    async with chat_app(pocket, max_tokens=8) as driver:
        await driver.press("ctrl+g")
        screen = await driver.opens(CompareScreen)
        await driver.type("hello\n")
        await driver.until(lambda: len(screen.nodes) == 2 and screen.run_now is None)
        panel = screen.query_one(TokenPanel)
        assert not panel.has_class("open")
        await driver.press("t", "right", "down")
        await driver.until(lambda: panel.has_class("open"))
        choice = screen.nodes[0].choices[1]
        assert panel.choice == choice
        assert panel.alternative == choice.alternatives[1]
        # On a low terminal as well, the reply stays in view: the settings give way.
        assert screen.query_one("#reply-0").size.height > 10
        await driver.press("f2")
        await driver.until(lambda: not panel.has_class("open"))
        await driver.until(lambda: isinstance(driver.app.focused, ControlList))
        await driver.press("t", "right", "down")
        await driver.until(lambda: panel.has_class("open"))
        await driver.press("enter")
        await driver.until(lambda: "Branches are made in the chat" in driver.told)
        screen.query_one("#reply-1").focus()
        await driver.settle()
        await driver.press("t")
        await driver.until(lambda: panel.choice == screen.nodes[1].choices[0])
        await driver.press("escape")
        await driver.until(lambda: not panel.has_class("open"))
        assert driver.app.screen is screen


async def test_both_sides_answer_again(pocket: Path) -> None:
    async with chat_app(pocket, max_tokens=4) as driver:
        await driver.press("ctrl+g")
        screen = await driver.opens(CompareScreen)
        await driver.type("hello there\n")
        await driver.until(lambda: len(screen.nodes) == 2 and screen.run_now is None)
        before = list(screen.nodes)
        await driver.press("r")
        await driver.until(lambda: screen.nodes[0] is not before[0] and screen.run_now is None)
        assert "A and B answer again: hello there" in driver.told
        assert len(driver.tree.siblings(before[0].id)) == 4


async def test_both_sides_are_stopped(pocket: Path) -> None:
    async with chat_app(pocket, sampling=ENDLESS, max_tokens=400) as driver:
        await driver.press("ctrl+g")
        screen = await driver.opens(CompareScreen)
        await driver.type("hello\n")
        await driver.until(
            lambda: (
                screen.run_now
                and len(screen.run_now.replies) == 2
                and all(len(reply.generation.ids) > 2 for reply in screen.run_now.replies)
            )
        )
        await driver.press("escape")
        await driver.until(lambda: screen.run_now is None)
        assert {node.meta["finish_reason"] for node in screen.nodes} == {"interrupted"}
        assert driver.app.screen is screen
