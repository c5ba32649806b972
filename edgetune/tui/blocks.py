"""What the conversation is drawn in: a block of lines for each message or notice, and one that grows for the reply
that is being made.
"""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.strip import Strip

from edgetune.chat.tree import Node
from edgetune.tui.live import Live, Notice
from edgetune.tui.markdown import MarkdownLines
from edgetune.tui.message_lines import MessageLines
from edgetune.tui.recorded import given_tokens, recorded_choices
from edgetune.tui.strips import strip_of
from edgetune.tui.token_lines import TokenLines
from edgetune.tui.visible import visible


class Block:
    """A message or notice; its lines are drawn when they are needed, until then their number is a guess."""

    def __init__(self, item: Node | Notice, lines: MessageLines, base: Style) -> None:
        self.item = item
        self.strips: list[Strip] = []
        self.body = 0
        """Index of the first line of its own text."""
        self.tokens: TokenLines | None = None
        self.is_drawn = False
        self.height = lines.guess_height(item)
        self._lines, self._base = lines, base

    def draw(self) -> None:
        """Draw its lines, once."""
        if self.is_drawn:
            return
        item, lines = self.item, self._lines
        if isinstance(item, Notice):
            self._set(self._strips(lines.notice(item)))
            return
        strips = self._strips(lines.head(item))
        self.body = len(strips)
        if item.role == "assistant" and lines.has_token_view and item.choices:
            self.tokens = TokenLines(lines.palette, lines.width)
            self.tokens.extend(item.generated, recorded_choices(lines.tree, item))
            strips += self._token_strips(0)
        else:
            strips += self._strips(lines.body(item))
        self._set(strips + self._strips(lines.foot(item)))

    def token_line(self, line: int, cursor: int) -> Strip | None:
        """A line of tokens, the one at `cursor` standing out; None where there are no tokens."""
        shown = line - self.body
        if self.tokens is None or not 0 <= shown < self.tokens.count:
            return None
        return self.tokens.strips(shown, cursor=cursor)[0].apply_style(self._base)

    def _set(self, strips: list[Strip]) -> None:
        self.strips, self.height, self.is_drawn = strips, len(strips), True

    def _strips(self, texts: list[Text]) -> list[Strip]:
        return [strip_of(text, self._base) for text in texts]

    def _token_strips(self, start: int) -> list[Strip]:
        assert self.tokens is not None
        return [strip.apply_style(self._base) for strip in self.tokens.strips(start)]


class LiveBlock(Block):
    """The reply that is being made: what has come is drawn, what was drawn stays."""

    def __init__(self, live: Live, lines: MessageLines, base: Style) -> None:
        super().__init__(live.node, lines, base)
        self._live = live
        self._texts: list[Text] = []
        self._markdown = MarkdownLines(lines.palette, lines.width)
        self._answer, self._visible = "", ""
        strips = self._strips(lines.head(live.node))
        self.body = len(strips)
        self._set(strips)
        self.grow()

    def grow(self) -> int:
        """Draw what is new; returns the first line that is other than before."""
        if self._lines.has_token_view and self._live.choices:
            return self._grow_tokens()
        live, lines = self._live, self._lines
        texts = lines.thinking(live.reasoning, is_running=not live.answer)
        if live.answer:
            texts = [*texts, *self._markdown.draw(self._visible_answer())]
        elif not live.reasoning:
            texts = [Text("…", lines.palette.muted)]
        first = next(
            (n for n, (old, new) in enumerate(zip(self._texts, texts, strict=False)) if old is not new and old != new),
            min(len(self._texts), len(texts)),
        )
        self._set([*self.strips[: self.body + first], *self._strips(texts[first:])])
        self._texts = texts
        return self.body + min(first, max(len(texts) - 1, 0))

    def _grow_tokens(self) -> int:
        live, lines = self._live, self._lines
        if self.tokens is None:
            self.tokens = TokenLines(lines.palette, lines.width)
            self.strips = self.strips[: self.body]
        count = len(self.tokens.places)
        # Only what a branch took over has its choices elsewhere.
        is_own = count >= given_tokens(live.node)
        choices = live.choices if is_own else recorded_choices(lines.tree, live.node, live.choices)
        first = max(0, min(self.tokens.count, len(self.strips) - self.body) - 1)
        self.tokens.extend(live.generated, choices)
        self._set(self.strips[: self.body + first] + self._token_strips(first))
        return self.body + first

    def _visible_answer(self) -> str:
        answer, before = self._live.answer, self._answer
        # A line end may come in two halves.
        if answer.startswith(before) and not before.endswith("\r"):
            self._visible += visible(answer[len(before) :])
        else:
            self._visible = visible(answer)
        self._answer = answer
        return self._visible
