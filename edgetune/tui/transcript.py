"""The conversation on the screen: one widget that draws its own lines, so that a reply costs its last lines alone.

Draws messages, notices and the reply that is being made, moves a cursor over messages and over a reply's tokens, and
tells what the keys on them mean. It changes nothing: the screen does what its messages ask for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar, Literal

from rich.segment import Segment
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip

from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import TokenChoice
from edgetune.tui.blocks import Block, LiveBlock
from edgetune.tui.lines_view import LinesView
from edgetune.tui.live import Live, Notice
from edgetune.tui.message_lines import MessageLines
from edgetune.tui.palette import Palette
from edgetune.tui.recorded import recorded_choices
from edgetune.tui.strips import strip_of

Wish = Literal["edit", "retry", "up", "down", "copy", "previous", "next", "branch", "leave"]
"""What a key on a message or a token asks the screen for."""

_GUTTER = 2
_AHEAD = 2
"""So many heights of the view are drawn above and below it at once, the rest when there is time."""
_SLICE, _PAUSE_SECONDS = 4, 0.03
"""How many messages of the rest are drawn at a time, and what is between."""
_WELCOME = (
    "Say something below. While it answers, move the sampling (^S), look at every token it chose (^T), and branch where"
    " you would have chosen another one.\n \n? keys   / commands   ^P everything"
)


class Transcript(LinesView, can_focus=True):
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
        self._blocks: list[Block] = []
        self._starts: list[int] = [0]
        self._unfolded: frozenset[str] = frozenset()
        self._known: dict[tuple[object, ...], Block] = {}
        self._empty: list[Strip] = []
        self._follows = True
        self._last_size = Size()
        self._is_drawing = False

    # -- what is shown

    def show(
        self, tree: Tree, *, notices: Sequence[Notice] = (), live: Live | None = None, follow: bool = True
    ) -> None:
        """Show the branch of `tree`, `notices`, and the reply that is being made."""
        self.messages, self.notices, self.live = tree, list(notices), live
        self._build(follow=follow)

    def grow(self) -> None:
        """The reply that is being made has gone on: draw what is new of it."""
        block = self._blocks[-1] if self._blocks else None
        if self.live is None or not isinstance(block, LiveBlock):
            return
        before, was_at_end = block.height, self.is_at_end
        first = self._starts[-2] + block.grow()
        if block.height != before:
            self._measure()
            if was_at_end:
                self.scroll_to_end()
        self.refresh_rows(first, self._starts[-2] + max(block.height, before))

    @property
    def selected(self) -> Node | None:
        """The message under the cursor."""
        if self.cursor is None or not 0 <= self.cursor < len(self._blocks):
            return None
        item = self._blocks[self.cursor].item
        return item if isinstance(item, Node) else None

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

    def put_cursor(self, node: Node, *, near: int | None = None) -> None:
        """Select `node`, or the message in the place `near`."""
        found = [number for number, block in enumerate(self._blocks) if block.item is node]
        self.cursor = found[0] if found else near
        if self.cursor is not None and self.cursor < len(self._blocks):
            self._bring_into_view(self.cursor)
        self.refresh()

    def choices_of(self, node: Node) -> Sequence[TokenChoice]:
        """What the tokens of a reply were chosen from, as far as it has come."""
        live = self.live.choices if self.live is not None and self.live.node is node else None
        return recorded_choices(self.messages, node, live)

    def generated_of(self, node: Node) -> str:
        """The text that those count in."""
        return self.live.generated if self.live is not None and self.live.node is node else node.generated

    # -- blocks: made at once, drawn when they come into view

    def _build(self, *, follow: bool) -> None:
        if self.palette is None or not self.size.width:
            return
        selected, lines = self.selected, self._message_lines()
        anchor = self._anchor()
        known, self._known, self._blocks = self._known, {}, []
        for item in self._items():
            key = self._key(item)
            block = self._known[key] = known.get(key) or Block(item, lines, self.base)
            self._blocks.append(block)
        if self.live is not None:
            self._blocks.append(LiveBlock(self.live, lines, self.base))
        greeting = [] if self._blocks else lines.greeting(self._greeting)
        self._empty = [strip_of(line, self.base) for line in greeting]
        self._keep_cursor(selected)
        self._measure()
        if not follow:
            self._scroll_to_anchor(*anchor)
        self._draw_near(follow=follow)
        self._follows, self._last_size = follow or self.is_at_end, self.size
        if not all(block.is_drawn for block in self._blocks):
            self._rest.resume()
        self.refresh()

    def _message_lines(self) -> MessageLines:
        assert self.palette is not None
        width = max(self.scrollable_content_region.width - _GUTTER - 1, 4)
        return MessageLines(
            self.palette, width, self.messages, self.model_name, self._unfolded, has_token_view=self.has_token_view
        )

    def _items(self) -> list[Node | Notice]:
        items: list[Node | Notice] = [notice for notice in self.notices if notice.after is None]
        for node in self.messages.path():
            if self.live is not None and node is self.live.node:
                continue
            items.append(node)
            items += [notice for notice in self.notices if notice.after == node.id]
        return items

    def _key(self, item: Node | Notice) -> tuple[object, ...]:
        """Blocks of the same key look alike."""
        look = (self.palette.name if self.palette else "", self.scrollable_content_region.width)
        if isinstance(item, Notice):
            return (id(item), *look)
        return (
            (item.id, len(item.content), len(item.ids), len(self.messages.siblings(item.id))),
            (item.meta.get("vote"), item.meta.get("finish_reason"), item.id in self._unfolded),
            (self.has_token_view, *look),
        )

    def _keep_cursor(self, selected: Node | None) -> None:
        """A message that gave way to another one leaves the cursor to what stands in its place."""
        if selected is not None:
            found = [number for number, block in enumerate(self._blocks) if block.item is selected]
            self.cursor = found[0] if found else self._neighbour(min(self.cursor or 0, len(self._blocks) - 1) + 1, -1)
            if not found and self.token is not None:
                self._set_token(None)
        if self.cursor is None and self.token is not None:
            self._set_token(None)

    def _measure(self) -> None:
        starts = [0]
        for block in self._blocks:
            starts.append(starts[-1] + block.height)
        self._starts = starts
        self.set_height(starts[-1] or len(self._empty))

    def _draw_near(self, *, follow: bool) -> None:
        """Draw what is in view and around it. What stands at the top of the view, or its end, stays there."""
        self._is_drawing = True
        while True:
            if follow:
                self.scroll_to_end()
            height = max(self.size.height, 1)
            first = self._block_at(self.scroll_offset.y - _AHEAD * height)
            last = self._block_at(self.scroll_offset.y + (_AHEAD + 1) * height)
            missing = [block for block in self._blocks[first : last + 1] if not block.is_drawn]
            if not missing:
                break
            self._draw(missing, follow=follow)
        self._is_drawing = False

    def _draw(self, blocks: Sequence[Block], *, follow: bool) -> None:
        if all(block.is_drawn for block in blocks):
            return
        anchor = self._anchor()
        for block in blocks:
            block.draw()
        self._measure()
        if follow:
            self.scroll_to_end()
        else:
            self._scroll_to_anchor(*anchor)
        self.refresh()

    def _anchor(self) -> tuple[Block | None, int]:
        """The block at the top of the view, and how much of it is above."""
        top = self.scroll_offset.y
        at = self._block_at(top)
        return (self._blocks[at], top - self._starts[at]) if self._blocks else (None, 0)

    def _scroll_to_anchor(self, anchor: Block | None, above: int) -> None:
        for block, start in zip(self._blocks, self._starts, strict=False):
            if anchor is not None and block.item is anchor.item:
                self.scroll_to(y=start + min(above, max(block.height - 1, 0)), animate=False, force=True)

    def _draw_rest(self) -> None:
        """Draw some of what was not in view yet, the last ones first; not while a reply is being made."""
        if self.live is not None and not self.live.is_over:
            self._rest.pause()
            return
        missing = [block for block in self._blocks if not block.is_drawn]
        self._draw(missing[-_SLICE:], follow=self._follows)
        if len(missing) <= _SLICE:
            self._rest.pause()

    def _block_at(self, row: int) -> int:
        return min(max(bisect_right(self._starts, row) - 1, 0), max(len(self._blocks) - 1, 0))

    # -- lines

    def line(self, row: int) -> Strip:
        """One line of what is in view."""
        assert self.palette is not None
        width = self.size.width
        if self._empty:
            strip = self._empty[row] if row < len(self._empty) else Strip.blank(width, self.base)
            return Strip([Segment("  ", self.base), *strip]).crop_extend(0, width, self.base)
        if row >= self._starts[-1]:
            return Strip.blank(width, self.base)
        number = self._block_at(row)
        block, line = self._blocks[number], row - self._starts[number]
        if not block.is_drawn:
            return Strip.blank(width, self.base)
        strip = block.strips[line]
        is_selected = number == self.cursor and self.has_focus
        if is_selected and self.token is not None:
            strip = block.token_line(line, self.token) or strip
        mark = "▌ " if is_selected and line < len(block.strips) - 1 else "  "
        gutter = Segment(mark, self.base + self.palette.ink("accent"))
        return Strip([gutter, *strip]).crop_extend(0, width, self.base)

    def is_passing(self, row: int) -> bool:
        """What a running reply shows by its tokens."""
        return self.live is not None and self.has_token_view and row >= self._starts[-2]

    def texts(self) -> list[str]:
        """All lines, for the mouse's selection."""
        self._draw([block for block in self._blocks if not block.is_drawn], follow=False)
        return [f"  {strip.text}".rstrip() for block in self._blocks for strip in block.strips]

    # -- events

    def on_mount(self) -> None:
        """Take up the theme's colours."""
        self._rest = self.set_interval(_PAUSE_SECONDS, self._draw_rest, pause=True)
        self.palette = Palette.of(self.app)
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._retheme())

    def on_resize(self) -> None:
        """Another width, other lines."""
        self._build(follow=self._follows)

    def watch_has_token_view(self) -> None:
        """Other lines."""
        if self.is_mounted:
            self._build(follow=self._follows)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Whether the end is in view is the user's wish, as long as the widget itself stays as it is."""
        super().watch_scroll_y(old_value, new_value)
        if self.size == self._last_size:
            self._follows = self.is_at_end
        if not self._is_drawing and any(not self._blocks[number].is_drawn for number in self._in_view()):
            self._draw_near(follow=False)

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
        number = self._block_at(row)
        if isinstance(self._blocks[number].item, Node):
            self.cursor = number
            self._set_token(event.style.meta.get("token"))
            self.refresh()

    def _in_view(self) -> range:
        top = self.scroll_offset.y
        return range(self._block_at(top), self._block_at(top + self.size.height) + 1 if self._blocks else 0)

    def _retheme(self) -> None:
        self.palette = Palette.of(self.app)
        self._known = {}
        self._build(follow=self._follows)

    # -- keys

    def action_move(self, step: int) -> None:
        """The message before or after; on a token, the alternative."""
        if self.token is not None:
            self.post_message(self.AlternativeMoved(step))
            return
        found = self._neighbour(len(self._blocks) if self.cursor is None else self.cursor, step)
        if found is not None:
            self.cursor = found
            self._bring_into_view(found)
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
            self._build(follow=False)

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
        if token is not None and self.cursor is not None:
            block = self._blocks[self.cursor]
            self._draw([block], follow=False)
            if block.tokens is not None:
                row = block.tokens.places[min(token, len(block.tokens.places) - 1)]
                self._bring_into_view(self.cursor, block.body + row, 1)
        self.post_message(self.TokenChanged(node, token) if token is not None else self.TokenChanged(None))
        self.refresh()

    def _bring_into_view(self, number: int, line: int = 0, height: int | None = None) -> None:
        """Scroll to these lines of a block; to all of it when `height` is None."""
        block = self._blocks[number]
        self._draw([block], follow=False)
        row, height = self._starts[number] + line, block.height if height is None else height
        top, room = self.scroll_offset.y, self.size.height
        if row < top or height > room:
            self.scroll_to(y=row, animate=False)
        elif row + height > top + room:
            self.scroll_to(y=row + height - room, animate=False)
