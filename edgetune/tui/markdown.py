"""Markdown → lines of a given width, block by block, so that a reply that grows costs its last block alone.

Draws headings, lists, quotes, tables, code with its colours, and what stands in a line. HTML is text like any other,
links show where they lead and are not followed. What comes in has to be `visible` already; character references could
bring control characters back, so what stands in a line is made visible once more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Span, Text

from edgetune.tui.palette import Palette
from edgetune.tui.visible import one_line, visible

CONSOLE = Console(width=200, color_system="truecolor", legacy_windows=False)
"""Text.wrap asks one for its defaults; nothing is printed to it."""
_BULLETS = "•◦▪"
_NARROWEST = 8


@lru_cache(1)
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


@dataclass
class MarkdownLines:
    """The lines of a text that only grows; blocks that are complete are drawn once."""

    palette: Palette
    width: int
    _text: str = ""
    _settled: int = 0
    """How many characters the complete blocks take."""
    _lines: list[Text] = field(default_factory=list)

    def draw(self, text: str) -> list[Text]:
        """The lines of `text`, which may go on from the one before."""
        if not text.startswith(self._text[: self._settled]):
            self._settled, self._lines = 0, []
        self._text = text
        rest = text[self._settled :]
        blocks = _blocks(rest)
        drawn = list(self._lines)
        starts = _line_starts(rest)
        for number, (tokens, first_line) in enumerate(blocks):
            is_last = number == len(blocks) - 1
            if is_last:
                self._lines = list(drawn)
                self._settled += starts[first_line] if number else 0
            if drawn:
                drawn.append(Text())
            drawn += list(_draw(tokens, self.palette, max(self.width, _NARROWEST)))
        return drawn


def draw_markdown(text: str, palette: Palette, width: int) -> list[Text]:
    """The lines of a whole text."""
    return MarkdownLines(palette, width).draw(text)


def wrapped(text: Text, width: int) -> list[Text]:
    """`text` on lines of at most `width` cells; what is longer than a line is broken."""
    return list(text.wrap(CONSOLE, max(width, 1), tab_size=4, overflow="fold"))


def _line_starts(text: str) -> list[int]:
    starts, at = [0], 0
    for line in text.split("\n"):
        at += len(line) + 1
        starts.append(at)
    return starts


def _blocks(text: str) -> list[tuple[list[Token], int]]:
    """(tokens, first line) of the blocks at the top."""
    found: list[tuple[list[Token], int]] = []
    depth = 0
    for token in _parser().parse(text):
        if depth == 0:
            found.append(([], token.map[0] if token.map else 0))
        found[-1][0].append(token)
        depth += token.nesting
    return found


def _draw(tokens: Sequence[Token], palette: Palette, width: int) -> Iterator[Text]:
    """The lines of one block."""
    first = tokens[0]
    if first.type == "heading_open":
        yield from _heading(first, tokens[1], palette, width)
    elif first.type in ("fence", "code_block"):
        yield from _code(first.content, first.info.split(" ")[0] if first.info else "", palette, width)
    elif first.type == "hr":
        yield Text("─" * width, palette.faint)
    elif first.type in ("bullet_list_open", "ordered_list_open"):
        yield from _list(tokens, palette, width)
    elif first.type == "blockquote_open":
        for line in _nested(tokens[1:-1], palette, width - 2):
            quoted = Text("▎ ", palette.faint)
            line.stylize_before(palette.muted)
            yield quoted.append_text(line)
    elif first.type == "table_open":
        yield from _table(tokens, palette, width)
    else:
        for token in tokens:
            if token.type == "inline":
                yield from wrapped(_inline(token, palette), width)


def _nested(tokens: Sequence[Token], palette: Palette, width: int, *, is_tight: bool = False) -> Iterator[Text]:
    """The lines of the blocks inside another one."""
    depth, block, is_first = 0, list[Token](), True
    for token in tokens:
        block.append(token)
        depth += token.nesting
        if depth == 0:
            if not is_first and not is_tight:
                yield Text()
            yield from _draw(block, palette, max(width, _NARROWEST))
            block, is_first = [], False


def _heading(opening: Token, inline: Token, palette: Palette, width: int) -> Iterator[Text]:
    level = int(opening.tag[1:])
    text = _inline(inline, palette)
    text.stylize(palette.ink("accent" if level <= 2 else "primary", bold=True))
    lines = wrapped(text, width)
    yield from lines
    if level == 1:
        yield Text("━" * min(width, max((cell_len(line.plain) for line in lines), default=0)), palette.faint)


def _list(tokens: Sequence[Token], palette: Palette, width: int) -> Iterator[Text]:
    is_ordered = tokens[0].type == "ordered_list_open"
    number = int(tokens[0].attrs.get("start", 1)) if is_ordered else 0
    items = list(_items(tokens[1:-1]))
    is_tight = not any(token.type == "paragraph_open" and not token.hidden for item in items for token in item)
    digits = len(str(number + len(items) - 1))
    for place, item in enumerate(items):
        bullet = _BULLETS[tokens[0].level // 2 % len(_BULLETS)]
        mark = f"{number + place:>{digits}}. " if is_ordered else f"{bullet} "
        if place and not is_tight:
            yield Text()
        for row, line in enumerate(_nested(item, palette, width - len(mark), is_tight=is_tight)):
            start = Text(mark if row == 0 else " " * len(mark), palette.ink("accent"))
            yield start.append_text(line)


def _items(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """What is inside each item of a list."""
    depth, item = 0, list[Token]()
    for token in tokens:
        if depth == 0 and token.type == "list_item_open":
            item = []
        elif depth == 1 and token.type == "list_item_close":
            yield item
        else:
            item.append(token)
        depth += token.nesting


def _code(code: str, language: str, palette: Palette, width: int) -> Iterator[Text]:
    highlighted = _highlight(visible(code.rstrip("\n")), language, palette)
    label = f" {one_line(language, length=width // 2)} " if language else ""
    for line in highlighted.split("\n", allow_blank=True):
        for part in wrapped(line, width - 2) or [Text()]:
            drawn = Text(" ").append_text(part)
            padding = width - cell_len(drawn.plain)
            if len(label) >= padding:
                label = ""
            drawn.append(" " * (padding - len(label))).append(label, palette.muted)
            drawn.stylize_before(palette.code)
            label = ""
            yield drawn


def _highlight(code: str, language: str, palette: Palette) -> Text:
    if not language:
        return Text(code)
    from rich.syntax import Syntax

    drawn = Syntax("", language, theme=palette.code_theme, background_color="default").highlight(code)
    spans = [Span(span.start, min(span.end, len(code)), _ink(span.style)) for span in drawn.spans]
    return Text(code, spans=[span for span in spans if span.start < span.end])


def _ink(style: str | Style) -> Style:
    """`style` without its background, which belongs to the block."""
    parsed = Style.parse(style) if isinstance(style, str) else style
    return Style(color=parsed.color, bold=parsed.bold, italic=parsed.italic, underline=parsed.underline)


def _table(tokens: Sequence[Token], palette: Palette, width: int) -> Iterator[Text]:
    rows: list[list[Text]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append(_inline(token, palette))
    columns = max(len(row) for row in rows)
    widths = [max((cell_len(row[n].plain) for row in rows if n < len(row)), default=1) for n in range(columns)]
    room = max(width - 3 * (columns - 1), columns)
    while sum(widths) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    for number, row in enumerate(rows):
        if number == 0:
            for cell in row:
                cell.stylize(Style(bold=True))
        yield from _row(row, widths, palette)
        if number == 0:
            yield Text("─┼─".join("─" * size for size in widths), palette.faint)


def _row(row: Sequence[Text], widths: Sequence[int], palette: Palette) -> Iterator[Text]:
    cells = [wrapped(cell, size) or [Text()] for cell, size in zip(row, widths, strict=False)]
    for height in range(max((len(cell) for cell in cells), default=0)):
        line = Text()
        for number, size in enumerate(widths):
            part = cells[number][height] if number < len(cells) and height < len(cells[number]) else Text()
            line.append(" │ ", palette.faint) if number else None
            line.append_text(part).append(" " * (size - cell_len(part.plain)))
        yield line


def _inline(token: Token, palette: Palette) -> Text:
    """What stands in a line; line breaks of the source stay, since models mean them."""
    text, styles = Text(), [Style()]
    address: list[tuple[str, int]] = []
    for child in token.children or ():
        opened = _INLINE.get(child.type.removesuffix("_open"))
        if child.type in ("softbreak", "hardbreak"):
            text.append("\n")
        elif child.type == "code_inline":
            text.append(visible(child.content), styles[-1] + palette.code + palette.ink("accent"))
        elif child.type == "image":
            source = visible(str(child.attrs.get("src", "")))
            text.append(f"[{visible(child.content)}]", styles[-1]).append(f" ({source})", palette.muted)
        elif child.type == "link_open":
            address.append((visible(str(child.attrs.get("href", ""))), len(text)))
            styles.append(styles[-1] + palette.ink("primary") + Style(underline=True))
        elif child.type == "link_close":
            styles.pop()
            href, start = address.pop()
            if href and text.plain[start:] != href:
                text.append(f" ({href})", palette.muted)
        elif opened is not None:
            styles.append(styles[-1] + opened)
        elif child.type.endswith("_close"):
            styles.pop()
        else:
            text.append(visible(child.content), styles[-1])
    return text


_INLINE: dict[str, Any] = {"strong": Style(bold=True), "em": Style(italic=True), "s": Style(strike=True)}
