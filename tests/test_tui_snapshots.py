"""Every screen as it was when somebody last looked at it: the text of each, and the style of each cell in three looks.

`python -m tests.test_tui_snapshots` writes them anew; look at the difference before it is kept.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import string
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.style import Style

from edgetune.chat import Node, Tree
from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.tui.app import EdgetuneApp
from edgetune.tui.themes import DARK, LIGHT
from tests.tui_pilot import Driver, chat_app, styled_lines

HERE = Path(__file__).resolve().parent / "tui_snapshots"
_WORDS = ("The", " sea", " is", " wide", " and", " **deep**", ".", "\n\n", "- salt", "\n- waves", "\n\n", "```python\n",
          "depth = 11", "\n", "```")  # fmt: skip
_TEXT = re.compile(r'<text class="[^"]*-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>')
_CELL = 12.2
"""How wide a character is in Textual's SVG."""
_LETTERS = string.ascii_letters + string.digits + string.punctuation
_CHANCES = (0.93, 0.61, 0.97, 0.22, 0.8, 0.05, 0.99, 0.7, 0.3, 0.9, 0.99, 0.98, 0.4, 0.99, 0.99)


def conversation() -> Tree:
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


def svg_lines(app: EdgetuneApp) -> str:
    """The text of the screen's SVG, by the lines it stands on."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for found in _TEXT.finditer(app.export_screenshot()):
        text = html.unescape(found[3]).replace("\xa0", " ")
        rows.setdefault(float(found[2]), []).append((float(found[1]), text))
    lines = []
    for y in sorted(rows):
        line = ""
        for x, text in sorted(rows[y]):
            line = line.ljust(round(x / _CELL)) + text
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def style_lines(app: EdgetuneApp) -> str:
    """A letter for the style of each cell, line by line, and what the letters stand for."""
    letters: dict[str, str] = {}
    rows = []
    for line in styled_lines(app):
        row = ""
        for text, style in line:
            row += letters.setdefault(_spelled(style), _LETTERS[len(letters)]) * cell_len(text)
        rows.append(row)
    return "\n".join([*rows, "", *(f"{letter} {name}" for name, letter in letters.items())]) + "\n"


def _spelled(style: Style | None) -> str:
    return str(Style(**_visible_parts(style))) if style else "none"


def _visible_parts(style: Style) -> dict[str, Any]:
    """Without links and meta data, which are not seen."""
    names = ("color", "bgcolor", "bold", "dim", "italic", "underline", "reverse", "strike")
    # What is off and what was never on look alike.
    return {name: getattr(style, name) or None for name in names}


async def _nothing(driver: Driver) -> None:
    pass


def keys(*names: str) -> Callable[[Driver], Awaitable[None]]:
    async def act(driver: Driver) -> None:
        await driver.press(*names)

    return act


async def _type_command(driver: Driver) -> None:
    await driver.type("/ex")


SCREENS: dict[str, tuple[tuple[int, int], bool, Callable[[Driver], Awaitable[None]]]] = {
    "welcome": ((80, 24), False, _nothing),
    "conversation": ((80, 24), True, _nothing),
    "conversation-20x5": ((20, 5), True, _nothing),
    "sampling": ((100, 30), True, keys("ctrl+s", "down")),
    "adapters": ((100, 30), True, keys("ctrl+l")),
    "tokens": ((80, 24), True, keys("ctrl+up", "t", "right", "right", "right", "down")),
    "branches": ((80, 24), True, keys("ctrl+b")),
    "completion": ((80, 24), True, _type_command),
    "keys": ((80, 24), True, keys("f1")),
    "compare": ((100, 30), True, keys("ctrl+g")),
    "chats": ((80, 24), False, keys("ctrl+o")),
    "system": ((80, 24), True, keys("f8")),
    "templates": ((80, 24), True, keys("f9")),
}
"""Name → (size, whether something was said, what is pressed)."""


@asynccontextmanager
async def shown(name: str) -> AsyncIterator[Driver]:
    size, is_spoken, act = SCREENS[name]
    async with chat_app(size=size, tree=conversation() if is_spoken else None) as driver:
        await driver.idle()
        await act(driver)
        await driver.idle()
        await driver.pilot.wait_for_scheduled_animations()
        await driver.pilot.pause()
        yield driver


def _path(name: str, look: str = "") -> Path:
    return HERE / "styles" / look.replace(" ", "-") / f"{name}.txt" if look else HERE / f"{name}.txt"


async def looks(name: str) -> dict[Path, str]:
    """Each snapshot's file, and what it has to be."""
    found = {}
    async with shown(name) as driver:
        found[_path(name)] = svg_lines(driver.app)
        for look, theme in (("dark", DARK), ("light", LIGHT)):
            driver.app.theme = theme.name
            await driver.idle()
            await driver.pilot.wait_for_scheduled_animations()
            found[_path(name, look)] = style_lines(driver.app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        async with shown(name) as driver:
            found[_path(name, "no colour")] = style_lines(driver.app)
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("name", SCREENS)
async def test_a_screen_looks_as_it_did(name: str) -> None:
    for path, now in (await looks(name)).items():
        assert now == path.read_text(encoding="utf-8"), path.name


def test_another_colour_is_seen() -> None:
    style = Style(color="#ff0000", bold=True)
    assert _spelled(style) != _spelled(style + Style(color="#fe0000"))
    assert _spelled(style) != _spelled(style + Style(bgcolor="#000001"))
    assert _spelled(style) == _spelled(style + Style(meta={"token": 3}, italic=False))


async def _write_all() -> None:
    os.environ.pop("NO_COLOR", None)
    for name in SCREENS:
        with tempfile.TemporaryDirectory() as home:
            os.environ["EDGETUNE_HOME"] = home
            for path, now in (await looks(name)).items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(_write_all())
