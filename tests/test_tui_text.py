"""What the screen is made of, without a screen: text made visible, Markdown, token lines, bars, history, rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.text import Text
from textual.color import Color

from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.tui.bars import bar, percent
from edgetune.tui.controls import Control
from edgetune.tui.history import History
from edgetune.tui.keys import key_name
from edgetune.tui.markdown import MarkdownLines, draw_markdown
from edgetune.tui.palette import Palette
from edgetune.tui.recorded import recorded_choices
from edgetune.tui.sampling_controls import MAX_TOKENS, NUMBERS, changed, values_of
from edgetune.tui.themes import DARK, LIGHT
from edgetune.tui.token_lines import TokenLines
from edgetune.tui.training_rows import append_rows, verdict_rows
from edgetune.tui.visible import one_line, token_text, typed, visible

COLORS = {
    "foreground": "#dddddd",
    "background": "#101010",
    "surface": "#181818",
    "panel": "#222222",
    "primary": "#7aa2f7",
    "secondary": "#9d8cff",
    "accent": "#4fd6be",
    "success": "#7fd88f",
    "warning": "#f0b866",
    "error": "#f2777a",
}
PALETTE = Palette("test", True, "full", {name: Color.parse(value) for name, value in COLORS.items()})
MARKDOWN = """# A title that is longer than a line of this width

Some **bold**, *slanted*, `code` and a [link](http://example.org/x).
A second line.

- one
- two
  - nested

    with a paragraph

3. three
4. four

> quoted
> twice

| a | b |
|---|---|
| 1 | a cell with more words than there is room for in it |

```python
def f(x: int) -> int:
    return x + 1  # one more than before, and a comment that is longer than the line
```

<b>not bold</b>
***
last"""


def plain(lines: list[Text]) -> list[str]:
    return [line.plain for line in lines]


def is_safe(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\r\nthree", "two\nlines\nthree"),
        ("tab\tbed", "tab    bed"),
        ("\x1b[2J\x1b]0;title\x07", "␛[2J␛]0;title␇"),
        ("\x9b31m", "\\x9b31m"),
        ("\ud800", "\\ud800"),
        ("abc\u202edef", "abc\\u202edef"),
        ("über 東京 🙂", "über 東京 🙂"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_every_character_is_safe_once_visible() -> None:
    text = visible("".join(chr(code) for code in range(0x3000)) + "\u2028\ufeff\U000e0001")
    assert not any((ord(char) < 0x20 and char != "\n") or 0x7F <= ord(char) < 0xA0 for char in text)
    assert not any(char in text for char in "\u202e\u2066\u200f\u2028\ufeff\U000e0001")
    text.encode("utf-8")


def test_one_line_and_tokens() -> None:
    assert one_line("a\n  b\x1b", length=20) == "a b␛"
    assert one_line("abcdefgh", length=5) == "abcd…"
    assert token_text(" the\n") == "␣the↵"
    assert token_text("") == "∅"
    assert token_text("\u0301") == "◌\u0301"
    assert typed("a\rb\r\nc\x1b") == "a\nb\nc␛"


@pytest.mark.parametrize("width", [10, 24, 60])
def test_markdown_that_grows_is_markdown_that_is_whole(width: int) -> None:
    growing = MarkdownLines(PALETTE, width)
    for end in range(len(MARKDOWN) + 1):
        lines = growing.draw(MARKDOWN[:end])
    assert plain(lines) == plain(draw_markdown(MARKDOWN, PALETTE, width))
    assert all(cell_len(line.plain) <= max(width, 12) for line in lines)


def test_markdown_says_what_it_means() -> None:
    lines = plain(draw_markdown(MARKDOWN, PALETTE, 60))
    assert "Some bold, slanted, code and a link (http://example.org/x)." in lines
    assert "• one" in lines
    assert "  ◦ nested" in lines
    assert "3. three" in lines
    assert "▎ quoted" in lines
    assert any(line.rstrip().endswith("python") and "def f" in line for line in lines)
    assert "<b>not bold</b>" in lines
    assert any("│" in line for line in lines)


def test_markdown_follows_another_text_after_the_first() -> None:
    lines = MarkdownLines(PALETTE, 40)
    lines.draw("one\n\ntwo\n\nthree")
    assert plain(lines.draw("other\n\ntext")) == ["other", "", "text"]


@pytest.mark.parametrize(
    "text", ["&#13;&#12;&#x202e;x", "`a&#13;`", "[x](<a&#13;b>)", "```a&#13;b\nc\n```", "&#27;[2J", "![a&#13;](b)"]
)
def test_character_references_bring_nothing_back(text: str) -> None:
    for line in draw_markdown(visible(text), PALETTE, 40):
        assert is_safe(line.plain), repr(line.plain)
        assert "\u202e" not in line.plain


def choice(number: int, text: str, start: int, probability: float = 0.5) -> TokenChoice:
    alternatives = (Candidate(number, text, probability, probability), Candidate(number + 100, "x", 0.1, 0.0))
    return TokenChoice(number, start, start + len(text), probability, probability, alternatives)


def test_tokens_are_laid_out_once_and_break_between_words() -> None:
    pieces = ["The", " sea", " is", " very", " deep", ".\n", "", "東京", " averylongwordthatfillslines"]
    text, choices = "", []
    lines = TokenLines(PALETTE, 10)
    for number, piece in enumerate(pieces):
        choices.append(choice(number, piece, len(text)))
        text += piece
        lines.extend(text, choices)
    shown = [strip.text for strip in lines.strips()]
    assert shown[0] == "The sea is"
    assert shown[1] == " very deep"
    assert shown[2] == ".↵"
    assert shown[3] == "·東京"
    assert "".join(shown[4:]).strip() == "averylongwordthatfillslines"
    assert all(cell_len(line) <= 10 for line in shown)
    assert lines.places == [0, 0, 0, 1, 1, 2, 3, 3, 4]
    whole = TokenLines(PALETTE, 10)
    whole.extend(text, choices)
    assert [strip.text for strip in whole.strips()] == shown
    marked = [segment for strip in lines.strips(cursor=3) for segment in strip if "very" in segment.text]
    assert marked[0].style is not None
    assert marked[0].style.bold


def test_shading_tells_the_unlikely() -> None:
    assert not PALETTE.shade(0.99).bgcolor
    assert PALETTE.shade(0.3) != PALETTE.shade(0.01)
    bare = Palette("bare", True, "none", PALETTE.colors)
    assert not bare.shade(0.99).underline
    assert bare.shade(0.3).underline
    assert bare.shade(0.01).reverse
    assert not bare.shade(0.01).color
    assert not bare.shade(0.01).bgcolor


@pytest.mark.parametrize("theme", [DARK, LIGHT], ids=lambda theme: theme.name)
def test_text_stands_out_from_its_background(theme: object) -> None:
    for name in ("foreground", "primary", "secondary", "accent", "warning", "error", "success"):
        for ground in ("background", "surface", "panel"):
            ink, paper = Color.parse(getattr(theme, name)), Color.parse(getattr(theme, ground))
            least = 4.5 if name == "foreground" else 3.0
            assert contrast(ink, paper) >= least, (name, ground)


def contrast(one: Color, other: Color) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(color: Color) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color.normalized]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_bars_and_shares() -> None:
    assert bar(1.0, 4) == "████"
    assert bar(0.0, 4) == ""
    assert bar(0.5, 1) == "▌"
    assert [percent(share) for share in (1, 0.5, 0.0123, 0.00001, 0)] == [" 100%", "50.0%", "1.23%", "<.01%", "   0%"]


def test_a_branch_keeps_the_choices_it_took_over() -> None:
    tree = Tree()
    tree.add(Node("user", "hi"))
    choices = [choice(1, "a", 0), choice(2, "b", 1), choice(3, "c", 2)]
    first = tree.add(Node("assistant", "abc", parent=tree.head, ids=(1, 2, 3), choices=choices))
    given = [TokenChoice(1, 0, 1, 1.0, 1.0), TokenChoice(102, 1, 2, 1.0, 1.0), choice(9, "z", 2)]
    origin = {"branched_from": {"node": first.id, "token": 1}}
    branch = tree.add(Node("assistant", "axz", parent=first.parent, ids=(1, 102, 9), choices=given, meta=origin))
    known = recorded_choices(tree, branch)
    assert known[0] == choices[0]
    assert known[1].alternatives == choices[1].alternatives
    assert known[1].probability == 0.1
    assert known[2] == given[2]
    assert recorded_choices(tree, first) == choices


def test_the_history_is_the_line_modes(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.write_text("\n# 2026\n+one\n\n# 2026\n+two\n+lines\n", encoding="utf-8")
    history = History(path)
    assert history.step(-1, "draft") == "two\nlines"
    assert history.step(-1, "two\nlines") == "one"
    assert history.step(-1, "one") is None
    assert history.step(1, "one") == "two\nlines"
    assert history.step(1, "") == "draft"
    assert history.step(1, "draft") is None
    history.add("three")
    assert History(path).step(-1, "") == "three"
    from prompt_toolkit.history import FileHistory

    assert list(FileHistory(str(path)).load_history_strings()) == ["three", "two\nlines", "one"]


def test_a_history_that_cannot_be_written_is_kept_in_memory(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add("one")
    assert history.step(-1, "") == "one"


def test_controls_know_every_parameter_they_show() -> None:
    sampling = Sampling()
    values = values_of(sampling, max_tokens=-1)
    assert set(values) == {control.name for control in NUMBERS}
    for control in NUMBERS:
        if control.name == MAX_TOKENS:
            continue
        assert control.default == getattr(sampling, control.name)
        for end in (control.low, control.high):
            assert getattr(changed(sampling, control.name, end), control.name) == end
    with pytest.raises(UsageError):
        changed(sampling, "top_p", 3.0)
    assert Control("x", "x", low=-1, unset="off").shown(-1) == "off"


def test_keys_have_names() -> None:
    assert key_name("ctrl+t,f4") == "^T F4"
    assert key_name("shift+left") == "Shift-←"


def test_a_verdict_becomes_rows(tmp_path: Path) -> None:
    tree = Tree()
    question = tree.add(Node("user", "hi"))
    good = tree.add(Node("assistant", "good", parent=question.id, meta={"vote": "up"}))
    bad = tree.add(Node("assistant", "bad", parent=question.id, meta={"vote": "down"}))
    pairs = verdict_rows(tree, [good, bad], kind="pairs", system="S")
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs] == [("good", "bad")]
    assert pairs[0]["prompt"][0] == {"role": "system", "content": "S"}
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"other": 1}', encoding="utf-8")
    assert append_rows(path, pairs) == 1
    assert append_rows(path, pairs) == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"other": 1}
    assert json.loads(lines[1]) == pairs[0]
    rows = verdict_rows(tree, [good, bad], kind="rows", system="")
    assert [row["messages"][-1]["content"] for row in rows] == ["good"]
    assert verdict_rows(tree, [bad], kind="rows", system="") == []
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no text"):
        append_rows(tmp_path / "image", rows)
