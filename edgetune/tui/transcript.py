"""The conversation to move about in: a cursor over messages and over a reply's tokens, what the keys on them ask for.

It changes nothing: the screen does what its messages ask for.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from edgetune.chat.tree import Node
from edgetune.tui.conversation_view import ConversationView

Wish = Literal["edit", "retry", "up", "down", "copy", "previous", "next", "branch", "leave"]
"""What a key on a message or a token asks the screen for."""

_WELCOME = (
    "Say something below. While it answers, move the sampling (^S), look at every token it chose (^T), and branch where"
    " you would have chosen another one.\n \n? keys   / commands   ^P everything"
)


class Transcript(ConversationView, can_focus=True):
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
        super().__init__(model_name=model_name, welcome=welcome, id=id)

    # -- the cursor

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

    def keep_cursor(self, selected: Node | None) -> None:
        """A message that gave way to another one leaves the cursor to what stands in its place."""
        if selected is not None:
            found = [number for number, block in enumerate(self._blocks) if block.item is selected]
            self.cursor = found[0] if found else self._neighbour(min(self.cursor or 0, len(self._blocks) - 1) + 1, -1)
            if not found and self.token is not None:
                self._set_token(None)
        if self.cursor is None and self.token is not None:
            self._set_token(None)

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

    # -- events and keys

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
