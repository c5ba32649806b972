"""The conversation's widget: what a growing reply and a long conversation cost, and where the view stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.strip import Strip

from edgetune.chat import Node, Tree
from edgetune.tui.transcript import Transcript
from tests.tui_pilot import ENDLESS, chat_app, pocket_gguf

pytestmark = pytest.mark.asyncio


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_gguf(tmp_path_factory.mktemp("pocket"))


async def test_a_new_line_lays_nothing_out(pocket: Path) -> None:
    async with chat_app(pocket, sampling=ENDLESS, max_tokens=-1, size=(40, 12)) as driver:
        await driver.type("hello there\n")
        await driver.until(lambda: driver.transcript.max_scroll_y > 3)
        layouts, height = driver.screen._layout_updates, driver.transcript.max_scroll_y
        drawn = count_lines(driver.transcript)
        await driver.until(lambda: driver.transcript.max_scroll_y > height + 3)
        assert driver.screen._layout_updates == layouts
        assert driver.transcript.scroll_offset.y == driver.transcript.max_scroll_y
        # Rows that scrolled by were drawn before.
        assert all(row > height for row in drawn[10:])
        assert driver.transcript.vertical_scrollbar.window_virtual_size == driver.transcript.virtual_size.height


def count_lines(transcript: Transcript) -> list[int]:
    """The rows that are drawn from now on."""
    drawn: list[int] = []
    line = transcript.line

    def note(row: int) -> Strip:
        drawn.append(row)
        return line(row)

    transcript.line = note  # type: ignore[method-assign]
    return drawn


def long_tree(turns: int) -> Tree:
    tree = Tree()
    for number in range(turns):
        parent = tree.head
        question = tree.add(Node("user", f"question {number} " * 9, parent=parent))
        tree.add(Node("assistant", f"answer {number}\n\n" + "- point\n" * (number % 7), parent=question.id))
    return tree


async def test_a_long_conversation_is_drawn_where_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_rest = Transcript._draw_rest
    monkeypatch.setattr(Transcript, "_draw_rest", lambda self: None)
    async with chat_app(tree=long_tree(200), ctx_size=256, size=(60, 20)) as driver:
        transcript = driver.transcript
        await driver.pilot.resize_terminal(50, 20)
        await driver.settle()
        assert "answer 199" in driver.text()
        assert sum(block.is_drawn for block in transcript._blocks) < 40
        await driver.press("ctrl+up", "home")
        await driver.settle()
        assert "question 0" in driver.text()
        transcript.scroll_to(y=transcript.max_scroll_y // 2, animate=False)
        await driver.settle()
        before = driver.text().splitlines()[:8]
        while not all(block.is_drawn for block in transcript._blocks):
            draw_rest(transcript)
        await driver.settle()
        # What is in view stays there while what is above turns out to be of another height.
        assert driver.text().splitlines()[:8] == before
        whole = [strip.text.strip() for block in transcript._blocks for strip in block.strips]
        assert [text for text in whole if text.startswith("answer")] == [f"answer {number}" for number in range(200)]
        await driver.press("end")
        await driver.settle()
        assert "answer 199" in driver.text()
