"""The chat screen by its keys: saying, stopping, commands, input, sampling, tokens and branches."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from textual import events
from textual.content import Content
from textual.widgets import OptionList, TextArea, Tree

from edgetune.chat.commands import COMMANDS
from edgetune.chat.presets import load_presets
from edgetune.chat.templates import load_template
from edgetune.engine.sampling import Sampling
from edgetune.paths import home_dir
from edgetune.tui.branches import BranchesScreen
from edgetune.tui.chat import ChatScreen
from edgetune.tui.controls import ControlList
from edgetune.tui.dialogs import LineDialog, TextDialog
from edgetune.tui.keys import KeysScreen
from edgetune.tui.templates import TemplatesScreen
from tests.tui_pilot import ENDLESS, chat_app, pocket_gguf

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_gguf(tmp_path_factory.mktemp("pocket"))


async def test_a_reply_is_streamed_shown_and_kept(pocket: Path) -> None:
    async with chat_app(pocket) as driver:
        node = await driver.say("What is the capital of France?")
        assert node.role == "assistant"
        assert node.content
        assert "What is the capital of France?" in driver.text()
        assert node.content.split()[0] in driver.text()
        assert node.choices
        assert "tok/s" in driver.text()
        assert driver.typed == ""
        kept = driver.chat.database.load(driver.chat.saving.session_id)
        assert [one.content for one in kept.path()] == [one.content for one in driver.tree.path()]


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
async def test_a_reply_is_stopped_and_what_was_said_stays(key: str) -> None:
    async with chat_app(sampling=ENDLESS, max_tokens=900) as driver:
        await driver.type("hello\n")
        await driver.running()
        await driver.press(key)
        await driver.idle()
        node = driver.tree.path()[-1]
        assert node.meta["finish_reason"] == "interrupted"
        assert 3 <= len(node.ids) < 900
        assert "stopped" in driver.text()


async def test_what_is_sent_while_a_reply_runs_stays_in_the_input() -> None:
    async with chat_app(sampling=ENDLESS, max_tokens=900) as driver:
        await driver.type("hello\n")
        await driver.running()
        await driver.type("and then\n")
        assert driver.typed == "and then"
        assert len(driver.tree.nodes) == 2
        await driver.press("escape")
        await driver.idle()


async def test_the_input_has_lines_and_a_history() -> None:
    async with chat_app(max_tokens=2) as driver:
        await driver.say("first")
        await driver.type("one")
        await driver.press("alt+enter")
        await driver.type("two")
        await driver.press("ctrl+j")
        await driver.type("three")
        assert driver.typed == "one\ntwo\nthree"
        await driver.press("up")
        assert driver.typed == "one\ntwo\nthree"
        await driver.press("up", "up")
        assert driver.typed == "first"
        await driver.press("down")
        assert driver.typed == "one\ntwo\nthree"
        await driver.press("ctrl+c")
        assert driver.typed == ""
    assert "+first\n" in (home_dir() / "history").read_text(encoding="utf-8")
    assert os.name == "nt" or (home_dir() / "history").stat().st_mode & 0o077 == 0


async def test_files_are_attached_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("remember the milk", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    async with chat_app(max_tokens=2) as driver:
        await driver.type("see @no")
        assert driver.screen.composer.is_open
        await driver.press("tab")
        assert driver.typed == "see @notes.txt "
        await driver.press("enter")
        await driver.idle()
        assert "remember the milk" in driver.tree.path()[0].content
        await driver.type("@./missing.txt\n")
        await driver.idle()
        assert len(driver.tree.path()) == 2
        assert driver.typed == "@./missing.txt"


async def test_pasted_control_characters_are_written_out() -> None:
    async with chat_app(max_tokens=2) as driver:
        driver.app.post_message(events.Paste("a\x1b[31mred\x07\r\nb\x9b\u202e"))
        await driver.settle()
        assert driver.typed == "a␛[31mred␇\nb\\x9b\\u202e"
        await driver.press("ctrl+s")
        await driver.until(lambda: driver.screen.side.has_focus_within)
        driver.app.post_message(events.Paste(" and c"))
        await driver.until(lambda: driver.typed.endswith(" and c"))
        assert driver.screen.composer.entry.has_focus


async def test_commands_are_those_of_the_line_mode() -> None:
    async with chat_app(max_tokens=2) as driver:
        await driver.type("/te")
        choices = driver.screen.query_one("#choices", OptionList)
        assert [str(choices.get_option_at_index(n).prompt).split()[0] for n in range(2)] == ["/temp", "/template"]
        await driver.type("mp 0.25\n")
        await driver.idle()
        assert driver.chat.conversation.sampling.temp == 0.25
        assert "temp 0.25" in driver.text()
        await driver.type("/nonsense\n")
        await driver.idle()
        assert driver.typed == "/nonsense"
        await driver.press("ctrl+c")
        await driver.say("hello")
        await driver.type("/undo\n")
        await driver.idle()
        assert driver.tree.head is None
        assert "Taken back: hello" in driver.text()
        await driver.type("/system Be brief.\n")
        await driver.idle()
        assert driver.chat.conversation.system == "Be brief."


async def test_a_changed_control_counts_from_the_next_token_on() -> None:
    async with chat_app(sampling=ENDLESS, max_tokens=900) as driver:
        await driver.press("ctrl+s")
        driver.screen.composer.entry.focus()
        await driver.settle()
        await driver.type("hello\n")
        await driver.running(5)
        driver.screen.side.current_list.focus()
        await driver.settle()
        await driver.press("down", "0", "enter")
        assert driver.chat.conversation.sampling.temp == 0
        so_far = len(driver.screen.run_now.replies[0].generation.ids) if driver.screen.run_now else 900
        await driver.running(so_far + 5)
        await driver.press("escape")
        await driver.press("escape")
        await driver.idle()
        node = driver.tree.path()[-1]
        assert node.meta["sampling"]["temp"] == 0
        assert all(choice.sampled == 1 for choice in node.choices[so_far + 2 :])
        assert any(choice.sampled < 1 for choice in node.choices[:so_far])


async def test_controls_by_keyboard_and_mouse(pocket: Path) -> None:
    async with chat_app(pocket, size=(100, 40)) as driver:
        await driver.press("f2")
        controls = driver.screen.side.query_one("#sampling", ControlList)
        await driver.until(lambda: controls.has_focus)
        await driver.press("down", "right", "right")
        assert driver.chat.conversation.sampling.temp == pytest.approx(0.9)
        await driver.press("shift+left")
        assert driver.chat.conversation.sampling.temp == pytest.approx(0.4)
        await driver.press("x")
        assert driver.chat.conversation.sampling.temp == Sampling().temp
        await driver.press("down")
        await driver.type("7\n")
        assert driver.chat.conversation.sampling.top_k == 7
        row = next(number for number, control in enumerate(controls.controls) if control.name == "top_p")
        await driver.pilot.click(controls, offset=(controls.size.width - 10, row))
        await driver.settle()
        assert 0.3 < driver.chat.conversation.sampling.top_p < 0.9
        row = next(number for number, control in enumerate(controls.controls) if control.name == "max_tokens")
        controls.cursor = row
        await driver.type("12\n")
        assert driver.chat.conversation.max_tokens == 12
        controls.cursor = 0
        await driver.press("left")
        assert driver.chat.conversation.sampling == Sampling(seed=3, temp=0)


async def test_the_plot_shows_what_a_control_keeps(pocket: Path) -> None:
    async with chat_app(pocket) as driver:
        await driver.say("hello")
        await driver.press("ctrl+s")
        await driver.idle()
        plot = driver.screen.side.plot
        assert len(plot.candidates) == 40
        await driver.press("down", "down")
        await driver.type("2\n")
        await driver.idle()
        assert driver.chat.conversation.sampling.top_k == 2
        assert 1 <= sum(candidate.sampled > 0 for candidate in plot.candidates) <= 2
        assert "of these 40 stay" in driver.text()
        await driver.press("ctrl+s")
        assert not driver.screen.side.has_class("open")


async def test_a_preset_of_ones_own(pocket: Path) -> None:
    async with chat_app(pocket) as driver:
        await driver.press("ctrl+s", "down", "right", "s")
        await driver.opens(LineDialog)
        await driver.type("mine\n")
        await driver.until(lambda: "mine" in load_presets("pocket"))
        assert load_presets("pocket")["mine"] == {"temp": 0.85}
        await driver.opens(ChatScreen)
        driver.screen.side.current_list.cursor = 0
        await driver.press("right", "right")
        assert driver.chat.conversation.sampling.temp != 0.85
        await driver.press("left", "left")
        assert driver.chat.conversation.sampling.temp == 0.85
        await driver.press("X")
        await driver.until(lambda: "mine" not in load_presets("pocket"))


async def test_enter_on_an_alternative_branches() -> None:
    async with chat_app(sampling=ENDLESS, max_tokens=12) as driver:
        node = await driver.say("hello")
        await driver.press("ctrl+up", "t")
        assert driver.transcript.has_token_view
        assert driver.screen.query_one("#tokens").has_class("open")
        await driver.press("right", "right", "right")
        assert driver.transcript.token == 3
        alternatives = node.choices[3].alternatives
        other = next(number for number, one in enumerate(alternatives) if one.id != node.ids[3])
        await driver.press(*["down"] * other, "enter")
        await driver.idle()
        branch = driver.tree.path()[-1]
        assert branch is not node
        assert branch.ids[:4] == (*node.ids[:3], alternatives[other].id)
        assert driver.tree.siblings(node.id) == [node, branch]
        assert "‹2/2›" in driver.text()
        # What the branch took over is as well known as what it chose.
        assert driver.transcript.choices_of(branch)[1].alternatives == node.choices[1].alternatives
        assert driver.transcript.choices_of(branch)[3].probability == alternatives[other].probability
        await driver.press("escape", "left")
        await driver.idle()
        assert driver.tree.path()[-1] is node
        assert "‹1/2›" in driver.text()


async def test_the_plot_shows_the_position_that_is_looked_at() -> None:
    async with chat_app(sampling=Sampling(temp=0, ignore_eos=True), max_tokens=6) as driver:
        node = await driver.say("hello")
        await driver.press("ctrl+s")
        await driver.idle()
        plot = driver.screen.side.plot
        following = plot.candidates
        await driver.press("ctrl+up", "t", "right", "right")
        await driver.until(lambda: plot.chosen == node.ids[2])
        assert list(plot.candidates) == list(node.choices[2].alternatives)
        await driver.press("ctrl+s", "ctrl+s")
        await driver.idle()
        assert plot.chosen == node.ids[2]
        await driver.press("ctrl+up", "escape")
        await driver.idle()
        assert plot.chosen is None
        assert list(plot.candidates) == list(following)


async def test_the_token_that_was_taken_is_no_branch() -> None:
    async with chat_app(sampling=Sampling(temp=0, ignore_eos=True), max_tokens=6) as driver:
        node = await driver.say("hello")
        await driver.press("ctrl+up", "enter", "enter")
        await driver.idle()
        assert driver.tree.siblings(node.id) == [node]


async def test_messages_are_edited_retried_and_voted_on(pocket: Path) -> None:
    async with chat_app(pocket, max_tokens=8) as driver:
        first = await driver.say("hello")
        await driver.press("ctrl+r")
        await driver.idle()
        second = driver.tree.path()[-1]
        assert driver.tree.siblings(first.id) == [first, second]
        await driver.press("ctrl+up", "plus")
        await driver.until(lambda: second.meta.get("vote") == "up")
        await driver.idle()
        assert "▲" in driver.text()
        await driver.press("e")
        (await driver.opens(TextDialog)).query_one(TextArea).text = "Better."
        await driver.press("ctrl+s")
        await driver.until(lambda: driver.tree.path()[-1].content == "Better.")
        await driver.idle()
        assert driver.tree.path()[-1].meta["edited_from"] == second.id
        await driver.press("up", "e")
        (await driver.opens(TextDialog)).query_one(TextArea).text = "Goodbye"
        await driver.press("ctrl+s")
        await driver.until(lambda: len(driver.tree.nodes) == 6)
        await driver.idle()
        assert [one.role for one in driver.tree.path()] == ["user", "assistant"]
        assert driver.tree.path()[0].content == "Goodbye"
        assert len(driver.tree.leaves()) == 4


async def test_the_tree_is_walked() -> None:
    async with chat_app(max_tokens=4) as driver:
        first = await driver.say("hello")
        await driver.press("ctrl+r")
        await driver.idle()
        assert driver.tree.head != first.id
        await driver.press("ctrl+b")
        cursor = (await driver.opens(BranchesScreen)).query_one(Tree)
        await driver.until(lambda: cursor.cursor_node and cursor.cursor_node.data == driver.tree.head)
        assert "Branches (2)" in driver.text()
        await driver.press("up", "enter")
        await driver.until(lambda: driver.tree.head == first.id)


async def test_the_system_prompt_and_templates_are_edited() -> None:
    async with chat_app(max_tokens=2) as driver:
        await driver.press("f8")
        await driver.opens(TextDialog)
        await driver.type("Be brief.")
        await driver.press("ctrl+s")
        await driver.until(lambda: driver.chat.conversation.system == "Be brief.")
        await driver.opens(ChatScreen)
        await driver.press("f9")
        await driver.opens(TemplatesScreen)
        await driver.press("n")
        await driver.opens(LineDialog)
        await driver.type("sum\n")
        (await driver.opens(TextDialog)).query_one(TextArea).text = "Sum up: {input}"
        await driver.press("ctrl+s")
        names = (await driver.opens(TemplatesScreen)).query_one(OptionList)
        await driver.until(lambda: names.highlighted == 0)
        assert load_template("sum") == "Sum up: {input}"
        await driver.press("enter")
        await driver.until(lambda: driver.typed == "Sum up: ")


async def test_keys_and_the_palette() -> None:
    async with chat_app(max_tokens=2) as driver:
        await driver.press("question_mark")
        await driver.opens(KeysScreen)
        assert "Sampling, with the next token's distribution" in driver.text()
        await driver.press("escape")
        await driver.opens(ChatScreen)
        await driver.type("why?")
        assert driver.typed == "why?"
        titles = [command.title for command in driver.app.get_system_commands(driver.screen)]
        assert "Adapters" in titles
        shown = [Content.from_markup(title).plain for title in titles]
        assert {f"/{command.name} {command.arguments}".rstrip() for command in COMMANDS} <= {*shown}


async def test_ctrl_d_saves_and_leaves() -> None:
    async with chat_app(max_tokens=2) as driver:
        await driver.say("hello")
        state = driver.chat.database.states.path(driver.chat.saving.session_id)
        await driver.press("ctrl+d")
        await driver.until(lambda: not driver.app.is_running)
        assert state.exists()
