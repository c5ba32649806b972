"""The conversation as lines: which message stands where, what is drawn of it now, what grows, what stays in view.

A message's height is a guess until it comes near the view; the rest is drawn when there is time. Knows where the cursor
is, because it is drawn; what moves it is `transcript`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rich.segment import Segment
from textual.geometry import Size
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

_GUTTER = 2
_AHEAD = 2
"""So many heights of the view are drawn above and below it at once, the rest when there is time."""
_SLICE, _PAUSE_SECONDS = 4, 0.03
"""How many messages of the rest are drawn at a time, and what is between."""


class ConversationView(LinesView):
    """Draws the branch, its notices, and the reply that is being made."""

    has_token_view = reactive(False)
    """Whether replies are shown by their tokens."""

    def __init__(self, *, model_name: str = "", welcome: str = "", id: str | None = None) -> None:
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

    def choices_of(self, node: Node) -> Sequence[TokenChoice]:
        """What the tokens of a reply were chosen from, as far as it has come."""
        live = self.live.choices if self.live is not None and self.live.node is node else None
        return recorded_choices(self.messages, node, live)

    def generated_of(self, node: Node) -> str:
        """The text that those count in."""
        return self.live.generated if self.live is not None and self.live.node is node else node.generated

    def keep_cursor(self, selected: Node | None) -> None:
        """Other messages are there: the cursor was on `selected`."""

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
        self.keep_cursor(selected)
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

    def _in_view(self) -> range:
        top = self.scroll_offset.y
        return range(self._block_at(top), self._block_at(top + self.size.height) + 1 if self._blocks else 0)

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

    def _retheme(self) -> None:
        self.palette = Palette.of(self.app)
        self._known = {}
        self._build(follow=self._follows)
