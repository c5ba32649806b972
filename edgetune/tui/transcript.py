"""The conversation on the screen: one widget that draws its own lines, so that a reply costs its last lines alone.

Draws messages, notices and the reply that is being made, moves a cursor over messages and over a reply's tokens, and
tells what the keys on them mean. It changes nothing: the screen does what its messages ask for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from edgetune.chat.session import adapter_name
from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import TokenChoice
from edgetune.tui.markdown import MarkdownLines, draw_markdown, wrapped
from edgetune.tui.palette import Palette
from edgetune.tui.recorded import recorded_choices
from edgetune.tui.strips import strip_of
from edgetune.tui.token_lines import TokenLines
from edgetune.tui.visible import one_line, visible

Wish = Literal["edit", "retry", "up", "down", "copy", "previous", "next", "branch", "leave"]
"""What a key on a message or a token asks the screen for."""

_GUTTER = 2
_FOLDED_LINES = 12
"""How much of a long question is shown until it is unfolded."""
_THINKING_LINES = 3
"""How much of the reasoning is shown while it goes on."""
_WELCOME = (
    "Say something below. While it answers, move the sampling (^S), look at every token it chose (^T), and branch where"
    " you would have chosen another one.\n \n? keys   / commands   ^P everything"
)
_ENDINGS = {"interrupted": "stopped", "length": "cut at the limit"}


@dataclass(frozen=True)
class Notice:
    """Lines that are no message: what a command said."""

    text: str
    after: str | None
    """The message it stands under; None at the beginning."""
    is_problem: bool = False


@dataclass
class Live:
    """The reply that is being made, as far as it has come."""

    node: Node
    reasoning: str = ""
    answer: str = ""
    generated: str = ""
    """All of its text, reasoning and tags as well: what `choices` count in."""
    choices: Sequence[TokenChoice] = ()
    is_over: bool = False


@dataclass
class _Block:
    """A message or notice with its lines."""

    item: Node | Notice
    strips: list[Strip] = field(default_factory=list)
    body: int = 0
    """Index of the first line of its own text."""
    tokens: TokenLines | None = None


class Transcript(ScrollView, can_focus=True):
    """Everything said on the branch."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Message before", show=False),
        Binding("down,j", "move(1)", "Message after", show=False),
        Binding("left,h", "side(-1)", "Other branch; token before", show=False),
        Binding("right,l", "side(1)", "Other branch; token after", show=False),
        Binding("enter", "enter", "Into a reply's tokens; branch at the alternative", show=False),
        Binding("t", "enter", "Into a reply's tokens; branch at the alternative", show=False),
        Binding("pageup", "page(-1)", "Scroll", show=False),
        Binding("pagedown", "page(1)", "Scroll", show=False),
        Binding("home,g", "edge(-1)", "First or last", show=False),
        Binding("end,G", "edge(1)", "First or last", show=False),
        Binding("e", "wish('edit')", "Edit the message, on a branch of its own", show=False),
        Binding("r", "wish('retry')", "Another reply beside this one", show=False),
        Binding("plus,u", "wish('up')", "Vote up", show=False),
        Binding("minus,d", "wish('down')", "Vote down", show=False),
        Binding("y,c", "wish('copy')", "Copy the message", show=False),
        Binding("o,space", "fold", "Unfold reasoning or a long message", show=False),
    ]

    has_token_view = reactive(False)
    """Whether replies are shown by their tokens."""

    class Wished(Message):
        """A key asks for something on the message under the cursor."""

        def __init__(self, wish: Wish, node: Node, *, token: int = -1, alternative: int = -1) -> None:
            super().__init__()
            self.wish, self.node, self.token, self.alternative = wish, node, token, alternative

    class TokenChanged(Message):
        """The cursor is on another token, or on none."""

        def __init__(self, node: Node | None, token: int = -1) -> None:
            super().__init__()
            self.node, self.token = node, token

    class AlternativeMoved(Message):
        """The cursor over a token's alternatives is to move."""

        def __init__(self, step: int) -> None:
            super().__init__()
            self.step = step

    class AlternativeTaken(Message):
        """The conversation is to branch at the token under the cursor."""

    def __init__(self, *, model_name: str = "", welcome: str = _WELCOME, id: str | None = None) -> None:
        """`welcome` stands here while nothing was said."""
        super().__init__(id=id)
        self._greeting = welcome
        self.model_name = model_name
        """What replies are headed with."""
        self.palette: Palette | None = None
        self.messages = Tree()
        self.notices: list[Notice] = []
        self.live: Live | None = None
        self.cursor: int | None = None
        """Index of the message the keys act on; None until they do."""
        self.token: int | None = None
        """The token under the cursor, of that message."""
        self._blocks: list[_Block] = []
        self._starts: list[int] = [0]
        self._unfolded: set[str] = set()
        self._drawn: dict[tuple[object, ...], _Block] = {}
        self._markdown: MarkdownLines | None = None
        self._texts: list[Text] = []
        self._empty: list[Strip] = []
        self._follows = True
        self._last_size = Size()

    # -- what is shown

    def show(
        self, tree: Tree, *, notices: Sequence[Notice] = (), live: Live | None = None, follow: bool = True
    ) -> None:
        """Show the branch of `tree`, `notices`, and the reply that is being made."""
        self.messages, self.notices, self.live = tree, list(notices), live
        self._draw_all(follow=follow)

    def grow(self) -> None:
        """The reply that is being made has gone on: draw what is new of it."""
        if self.live is None or not self._blocks or self.palette is None:
            return
        block, before = self._blocks[-1], self._blocks[-1].strips
        first = self._draw_live(block)
        if len(block.strips) != len(before):
            was_at_end = self._is_at_end
            self._measure(follow=was_at_end)
        top = self._starts[-2] + first
        self.refresh(Region(0, top - self.scroll_offset.y, self.size.width, len(block.strips) - first))

    @property
    def selected(self) -> Node | None:
        """The message under the cursor."""
        if self.cursor is None or not 0 <= self.cursor < len(self._blocks):
            return None
        item = self._blocks[self.cursor].item
        return item if isinstance(item, Node) else None

    def redraw(self) -> None:
        """Draw everything anew: another width, theme or view."""
        self._draw_all(follow=self._follows)

    def leave_tokens(self) -> bool:
        """Take the cursor out of a reply's tokens; whether it was there."""
        if self.token is None:
            return False
        self._set_token(None)
        return True

    def place_token(self, node: Node, token: int) -> None:
        """Put the cursor on a token of `node`."""
        for number, block in enumerate(self._blocks):
            if block.item is node:
                self.cursor = number
                self._set_token(token)

    # -- drawing

    @property
    def _is_at_end(self) -> bool:
        return self.scroll_offset.y >= self.max_scroll_y - 1

    @property
    def _width(self) -> int:
        return max(self.scrollable_content_region.width - _GUTTER - 1, 4)

    def _draw_all(self, *, follow: bool) -> None:
        if self.palette is None or not self.size.width:
            return
        selected = self.selected
        items: list[Node | Notice] = [notice for notice in self.notices if notice.after is None]
        for node in self.messages.path():
            if self.live is not None and node is self.live.node:
                continue
            items.append(node)
            items += [notice for notice in self.notices if notice.after == node.id]
        fresh: dict[tuple[object, ...], _Block] = {}
        self._blocks = []
        for item in items:
            key = self._key(item)
            block = fresh[key] = self._drawn.get(key) or self._draw(item)
            self._blocks.append(block)
        self._drawn = fresh
        if self.live is not None:
            block = _Block(self.live.node)
            self._markdown, self._texts = None, []
            self._draw_live(block)
            self._blocks.append(block)
        self._empty = [] if self._blocks else [self._strip(line) for line in self._welcome()]
        if selected is not None:
            # A message that gave way to another one leaves the cursor to what stands in its place.
            found = [number for number, block in enumerate(self._blocks) if block.item is selected]
            self.cursor = found[0] if found else self._neighbour(min(self.cursor or 0, len(self._blocks) - 1) + 1, -1)
            if not found and self.token is not None:
                self._set_token(None)
        if self.cursor is None and self.token is not None:
            self._set_token(None)
        self._measure(follow=follow)
        self.refresh()

    def _key(self, item: Node | Notice) -> tuple[object, ...]:
        palette = self.palette.name if self.palette else ""
        if isinstance(item, Notice):
            return (id(item), self._width, palette)
        siblings = self.messages.siblings(item.id)
        return (
            (item.id, len(item.content), len(item.ids), len(siblings)),
            (item.meta.get("vote"), item.meta.get("finish_reason"), item.id in self._unfolded),
            (self.has_token_view, self._width, palette),
        )

    def _measure(self, *, follow: bool) -> None:
        starts = [0]
        for block in self._blocks:
            starts.append(starts[-1] + len(block.strips))
        self._starts = starts
        height = starts[-1] or len(self._empty)
        size = Size(self.scrollable_content_region.width, height)
        if size != self.virtual_size:
            self.virtual_size = size
        if follow:
            self.scroll_end(animate=False, immediate=True, x_axis=False)
        self._follows, self._last_size = follow or self._is_at_end, self.size

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Whether the end is in view is the user's wish, as long as the widget itself stays as it is."""
        super().watch_scroll_y(old_value, new_value)
        if self.size == self._last_size:
            self._follows = self._is_at_end

    def _draw(self, item: Node | Notice) -> _Block:
        block = _Block(item)
        if isinstance(item, Notice):
            block.strips = [self._strip(line) for line in self._notice_lines(item)]
            return block
        block.strips = [self._strip(line) for line in self._head(item)]
        block.body = len(block.strips)
        if item.role == "assistant" and self.has_token_view and item.choices:
            block.tokens = TokenLines(self._colors, self._width)
            block.tokens.extend(item.generated, recorded_choices(self.messages, item))
            block.strips += self._based(block.tokens.strips())
        else:
            block.strips += [self._strip(line) for line in self._body(item)]
        block.strips += [self._strip(line) for line in self._foot(item)]
        return block

    def _draw_live(self, block: _Block) -> int:
        """Draw the reply that is being made; returns the first line that is other than before."""
        live, colors = self.live, self._colors
        assert live is not None
        if not block.strips:
            block.strips = [self._strip(line) for line in self._head(live.node)]
            block.body = len(block.strips)
        if self.has_token_view and live.choices:
            if block.tokens is None:
                block.tokens = TokenLines(colors, self._width)
                block.strips = block.strips[: block.body]
            first = max(0, min(block.tokens.count, len(block.strips) - block.body) - 1)
            block.tokens.extend(live.generated, recorded_choices(self.messages, live.node, live.choices))
            block.strips = block.strips[: block.body + first] + self._based(block.tokens.strips(first))
            return block.body + first
        texts = self._thinking(live.reasoning, is_running=not live.answer)
        if live.answer:
            self._markdown = self._markdown or MarkdownLines(colors, self._width)
            texts = [*texts, *self._markdown.draw(visible(live.answer))]
        elif not live.reasoning:
            texts = [Text("…", colors.muted)]
        first = next(
            (n for n, (old, new) in enumerate(zip(self._texts, texts, strict=False)) if old is not new and old != new),
            min(len(self._texts), len(texts)),
        )
        kept = block.strips[: block.body + first]
        block.strips = [*kept, *(self._strip(text) for text in texts[first:])]
        self._texts = texts
        return block.body + min(first, max(len(texts) - 1, 0))

    def _head(self, node: Node) -> list[Text]:
        colors = self._colors
        names = {"user": "You", "assistant": self.model_name or "Model", "tool": "Tool", "system": "System"}
        name = Text(
            names.get(node.role, one_line(node.role)),
            colors.ink("accent" if node.role == "user" else "primary", bold=True),
        )
        adapters = [one for one in node.meta.get("adapters", []) if isinstance(one, dict)]
        if adapters and node.role == "assistant":
            shown = ", ".join(f"{adapter_name(Path(str(one['path'])))} {one['scale']:g}" for one in adapters)
            name.append(f" + {one_line(shown, length=self._width // 2)}", colors.muted)
        right = Text()
        if vote := node.meta.get("vote"):
            right.append("▲ " if vote == "up" else "▼ ", colors.ink("success" if vote == "up" else "error", bold=True))
        if node.meta.get("edited_from"):
            right.append("edited ", colors.muted)
        if "branched_from" in node.meta:
            right.append("⎇ ", colors.ink("secondary"))
        if node.id in self.messages.nodes and len(siblings := self.messages.siblings(node.id)) > 1:
            number = next(number for number, one in enumerate(siblings, 1) if one.id == node.id)
            right.append(f"‹{number}/{len(siblings)}›", colors.ink("secondary", bold=True))
        if right:
            room = self._width - cell_len(name.plain) - cell_len(right.plain)
            name.append(" " * max(room, 1)).append_text(right)
        return [name]

    def _body(self, node: Node) -> list[Text]:
        is_open = node.id in self._unfolded
        if node.role != "assistant":
            lines = wrapped(Text(visible(node.content)), self._width)
            if len(lines) <= _FOLDED_LINES + 1 or is_open:
                return lines
            return [
                *lines[:_FOLDED_LINES],
                Text(f"… {len(lines) - _FOLDED_LINES} more lines (o unfolds)", self._colors.muted),
            ]
        reasoning = str(node.meta.get("reasoning", ""))
        lines = self._thinking(reasoning, is_open=is_open)
        content = visible(node.content)
        lines += draw_markdown(content, self._colors, self._width) if content.strip() else []
        if calls := node.meta.get("fields", {}).get("tool_calls"):
            lines.append(Text(f"calls {one_line(str(calls))}", self._colors.ink("secondary")))
        return lines

    def _thinking(self, reasoning: str, *, is_running: bool = False, is_open: bool = False) -> list[Text]:
        if not reasoning:
            return []
        colors = self._colors
        lines = wrapped(Text(visible(reasoning).strip(), colors.muted + Style(italic=True)), self._width - 2)
        if is_running:
            head, lines = "▾ thinking …", lines[-_THINKING_LINES:]
        elif is_open:
            head = "▾ reasoning"
        else:
            return [Text(f"▸ reasoning, {len(reasoning.split())} words (o unfolds)", colors.muted)]
        return [Text(head, colors.muted), *(Text("  ").append_text(line) for line in lines), Text()]

    def _foot(self, node: Node) -> list[Text]:
        parts = []
        if ending := _ENDINGS.get(str(node.meta.get("finish_reason"))):
            parts.append(ending)
        if (speed := node.meta.get("timings", {})).get("generated_tokens") and self.has_token_view:
            parts.append(f"{speed['generated_tokens']} tokens · {speed['tokens_per_second']:.1f}/s")
        return [*([Text(" · ".join(parts), self._colors.muted)] if parts else []), Text()]

    def _notice_lines(self, notice: Notice) -> list[Text]:
        style = self._colors.ink("warning") if notice.is_problem else self._colors.muted
        lines = [
            part
            for line in visible(notice.text).split("\n")
            for part in wrapped(Text(line, style), self._width - 2) or [Text()]
        ]
        return [*(Text("│ ", self._colors.faint).append_text(line) for line in lines), Text()]

    def _welcome(self) -> list[Text]:
        colors = self._colors
        return [
            Text(),
            Text(self.model_name or "edgetune", colors.ink("primary", bold=True)),
            Text(),
            *(line for text in self._greeting.split("\n") for line in wrapped(Text(text, colors.muted), self._width)),
        ]

    @property
    def _colors(self) -> Palette:
        assert self.palette is not None
        return self.palette

    def _strip(self, text: Text) -> Strip:
        return strip_of(text, self.rich_style)

    def _based(self, strips: list[Strip]) -> list[Strip]:
        return [strip.apply_style(self.rich_style) for strip in strips]

    def render_line(self, y: int) -> Strip:
        """One line of what is in view."""
        row, width, base = y + self.scroll_offset.y, self.size.width, self.rich_style
        if self._empty:
            strip = self._empty[row] if row < len(self._empty) else Strip.blank(width, base)
            return Strip([Segment("  ", base), *strip]).crop_extend(0, width, base)
        if row >= self._starts[-1]:
            return Strip.blank(width, base)
        number = bisect_right(self._starts, row) - 1
        block = self._blocks[number]
        line = row - self._starts[number]
        strip = block.strips[line]
        is_selected = number == self.cursor and self.has_focus
        if is_selected and self.token is not None and block.tokens is not None:
            shown = line - block.body
            if 0 <= shown < block.tokens.count:
                strip = self._based(block.tokens.strips(shown, cursor=self.token)[:1])[0]
        mark = "▌ " if is_selected and line < len(block.strips) - 1 else "  "
        strip = Strip([Segment(mark, base + self._colors.ink("accent")), *strip]).crop_extend(0, width, base)
        return self._with_selection(strip, row).apply_offsets(0, row)

    def _with_selection(self, strip: Strip, row: int) -> Strip:
        selection = self.text_selection
        span = selection.get_span(row) if selection is not None else None
        if span is None:
            return strip
        start, end = span[0], span[1] if span[1] >= 0 else strip.cell_length
        before, inside, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end)
        style = self.screen.get_component_rich_style("screen--selection")
        marked = [Segment(part.text, (part.style or Style()) + style) for part in inside]
        return Strip([*before, *marked, *after])

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that the mouse has marked."""
        lines = [f"  {strip.text}".rstrip() for block in self._blocks for strip in block.strips]
        return selection.extract("\n".join(lines)), "\n"

    # -- events and keys

    def on_mount(self) -> None:
        """Take up the theme's colours."""
        self.palette = Palette.of(self.app)
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._retheme())

    def on_resize(self) -> None:
        """Another width, other lines."""
        self.redraw()

    def on_focus(self) -> None:
        """The cursor appears on the last message."""
        if self.selected is None:
            self.cursor = self._neighbour(len(self._blocks), -1)
        self.refresh()

    def on_blur(self) -> None:
        """The cursor goes out of sight."""
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Put the cursor on a message, and on a token where those are shown."""
        row = event.y + self.scroll_offset.y
        if self._empty or row >= self._starts[-1]:
            return
        number = bisect_right(self._starts, row) - 1
        if isinstance(self._blocks[number].item, Node):
            self.cursor = number
            token = event.style.meta.get("token")
            self._set_token(token if token is not None else None)
            self.refresh()

    def watch_has_token_view(self) -> None:
        """Other lines."""
        if self.is_mounted:
            self.redraw()

    def action_move(self, step: int) -> None:
        """The message before or after; on a token, the alternative."""
        if self.token is not None:
            self.post_message(self.AlternativeMoved(step))
            return
        found = self._neighbour(len(self._blocks) if self.cursor is None else self.cursor, step)
        if found is not None:
            self.cursor = found
            self._bring_into_view(self._starts[found], len(self._blocks[found].strips))
            self.refresh()

    def action_side(self, step: int) -> None:
        """The branch beside; on a token, the token beside."""
        node = self.selected
        if node is None:
            return
        if self.token is None:
            self.post_message(self.Wished("previous" if step < 0 else "next", node))
            return
        count = len(self.choices_of(node))
        self._set_token(min(max(self.token + step, 0), count - 1))

    def action_enter(self) -> None:
        """Go into a reply's tokens; on one, branch."""
        node = self.selected
        if node is None:
            return
        if self.token is not None:
            self.post_message(self.AlternativeTaken())
        elif self.choices_of(node):
            self.has_token_view = True
            self._set_token(0)
        else:
            self.app.bell()

    def action_page(self, step: int) -> None:
        """Scroll by what is in view."""
        self.scroll_relative(y=step * max(self.size.height - 2, 1), animate=False)

    def action_edge(self, step: int) -> None:
        """The first or last message or token."""
        node = self.selected
        if self.token is not None and node is not None:
            self._set_token(0 if step < 0 else len(self.choices_of(node)) - 1)
            return
        found = self._neighbour(-1 if step < 0 else len(self._blocks), -step)
        if found is not None:
            self.cursor = found
        self.scroll_home(animate=False) if step < 0 else self.scroll_end(animate=False)
        self.refresh()

    def action_wish(self, wish: Wish) -> None:
        """Ask the screen."""
        if (node := self.selected) is not None:
            self.post_message(self.Wished(wish, node))

    def action_fold(self) -> None:
        """Show all of a message, or less."""
        if (node := self.selected) is not None:
            self._unfolded ^= {node.id}
            self._draw_all(follow=False)

    def choices_of(self, node: Node) -> Sequence[TokenChoice]:
        """What the tokens of a reply were chosen from, as far as it has come."""
        live = self.live.choices if self.live is not None and self.live.node is node else None
        return recorded_choices(self.messages, node, live)

    def generated_of(self, node: Node) -> str:
        """The text that those count in."""
        return self.live.generated if self.live is not None and self.live.node is node else node.generated

    def put_cursor(self, node: Node, *, near: int | None = None) -> None:
        """Select `node`, or the message in the place `near`."""
        found = [number for number, block in enumerate(self._blocks) if block.item is node]
        self.cursor = found[0] if found else near
        if self.cursor is not None and self.cursor < len(self._blocks):
            self._bring_into_view(self._starts[self.cursor], len(self._blocks[self.cursor].strips))
        self.refresh()

    def _neighbour(self, start: int, step: int) -> int | None:
        at = start + step
        while 0 <= at < len(self._blocks):
            if isinstance(self._blocks[at].item, Node):
                return at
            at += step
        return None

    def _set_token(self, token: int | None) -> None:
        self.token = token
        node = self.selected
        if token is not None and self.cursor is not None and (lines := self._blocks[self.cursor].tokens) is not None:
            row = lines.places[min(token, len(lines.places) - 1)]
            self._bring_into_view(self._starts[self.cursor] + self._blocks[self.cursor].body + row, 1)
        self.post_message(self.TokenChanged(node, token) if token is not None else self.TokenChanged(None))
        self.refresh()

    def _bring_into_view(self, row: int, height: int) -> None:
        top, room = self.scroll_offset.y, self.size.height
        if row < top or height > room:
            self.scroll_to(y=row, animate=False, immediate=True)
        elif row + height > top + room:
            self.scroll_to(y=row + height - room, animate=False, immediate=True)

    def _retheme(self) -> None:
        self.palette = Palette.of(self.app)
        self._drawn = {}
        self.redraw()
