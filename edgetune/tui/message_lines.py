"""A message, a notice or the greeting → lines of text of a given width."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from edgetune.chat.session import adapter_name
from edgetune.chat.tree import Node, Tree
from edgetune.tui.live import Notice
from edgetune.tui.markdown import draw_markdown, wrapped
from edgetune.tui.palette import Palette
from edgetune.tui.visible import one_line, visible

_FOLDED_LINES = 12
"""How much of a long question is shown until it is unfolded."""
_THINKING_LINES = 3
"""How much of the reasoning is shown while it goes on."""
_ENDINGS = {"interrupted": "stopped", "length": "cut at the limit"}


@dataclass(frozen=True)
class MessageLines:
    """Draws by these: the messages of `tree`, in `width` cells."""

    palette: Palette
    width: int
    tree: Tree
    model_name: str
    """What replies are headed with."""
    unfolded: Container[str]
    """Messages that are shown whole."""
    has_token_view: bool

    def head(self, node: Node) -> list[Text]:
        """Who speaks; vote, branch and siblings at the right."""
        palette = self.palette
        names = {"user": "You", "assistant": self.model_name or "Model", "tool": "Tool", "system": "System"}
        name = Text(
            names.get(node.role, one_line(node.role)),
            palette.ink("accent" if node.role == "user" else "primary", bold=True),
        )
        adapters = [one for one in node.meta.get("adapters", []) if isinstance(one, dict)]
        if adapters and node.role == "assistant":
            shown = ", ".join(f"{adapter_name(Path(str(one['path'])))} {one['scale']:g}" for one in adapters)
            name.append(f" + {one_line(shown, length=self.width // 2)}", palette.muted)
        if right := self._marks(node):
            room = self.width - cell_len(name.plain) - cell_len(right.plain)
            name.append(" " * max(room, 1)).append_text(right)
        return [name]

    def _marks(self, node: Node) -> Text:
        ink, right = self.palette.ink, Text()
        if vote := node.meta.get("vote"):
            right.append("▲ " if vote == "up" else "▼ ", ink("success" if vote == "up" else "error", bold=True))
        if node.meta.get("edited_from"):
            right.append("edited ", self.palette.muted)
        if "branched_from" in node.meta:
            right.append("⎇ ", ink("secondary"))
        if node.id in self.tree.nodes and len(siblings := self.tree.siblings(node.id)) > 1:
            number = next(number for number, one in enumerate(siblings, 1) if one.id == node.id)
            right.append(f"‹{number}/{len(siblings)}›", ink("secondary", bold=True))
        return right

    def body(self, node: Node) -> list[Text]:
        """What was said."""
        is_open = node.id in self.unfolded
        if node.role != "assistant":
            lines = wrapped(Text(visible(node.content)), self.width)
            if len(lines) <= _FOLDED_LINES + 1 or is_open:
                return lines
            more = f"… {len(lines) - _FOLDED_LINES} more lines (o unfolds)"
            return [*lines[:_FOLDED_LINES], Text(more, self.palette.muted)]
        lines = self.thinking(str(node.meta.get("reasoning", "")), is_open=is_open)
        content = visible(node.content)
        lines += draw_markdown(content, self.palette, self.width) if content.strip() else []
        if calls := node.meta.get("fields", {}).get("tool_calls"):
            lines.append(Text(f"calls {one_line(str(calls))}", self.palette.ink("secondary")))
        return lines

    def thinking(self, reasoning: str, *, is_running: bool = False, is_open: bool = False) -> list[Text]:
        """The reasoning before the answer: its end while it goes on, then folded."""
        if not reasoning:
            return []
        muted = self.palette.muted
        if not is_running and not is_open:
            return [Text(f"▸ reasoning, {len(reasoning.split())} words (o unfolds)", muted)]
        lines = wrapped(Text(visible(reasoning).strip(), muted + Style(italic=True)), self.width - 2)
        head = "▾ thinking …" if is_running else "▾ reasoning"
        shown = lines[-_THINKING_LINES:] if is_running else lines
        return [Text(head, muted), *(Text("  ").append_text(line) for line in shown), Text()]

    def foot(self, node: Node) -> list[Text]:
        """How it ended, and a line between it and the next one."""
        parts = []
        if ending := _ENDINGS.get(str(node.meta.get("finish_reason"))):
            parts.append(ending)
        if (speed := node.meta.get("timings", {})).get("generated_tokens") and self.has_token_view:
            parts.append(f"{speed['generated_tokens']} tokens · {speed['tokens_per_second']:.1f}/s")
        return [*([Text(" · ".join(parts), self.palette.muted)] if parts else []), Text()]

    def notice(self, notice: Notice) -> list[Text]:
        """What a command said."""
        style = self.palette.ink("warning") if notice.is_problem else self.palette.muted
        lines = [
            part
            for line in visible(notice.text).split("\n")
            for part in wrapped(Text(line, style), self.width - 2) or [Text()]
        ]
        return [*(Text("│ ", self.palette.faint).append_text(line) for line in lines), Text()]

    def greeting(self, text: str) -> list[Text]:
        """What stands where nothing was said yet."""
        palette = self.palette
        return [
            Text(),
            Text(self.model_name or "edgetune", palette.ink("primary", bold=True)),
            Text(),
            *(line for part in text.split("\n") for line in wrapped(Text(part, palette.muted), self.width)),
        ]

    def guess_height(self, item: Node | Notice) -> int:
        """About how many lines it will take."""
        text = item.text if isinstance(item, Notice) else item.content
        lines = text.count("\n") + len(text) // max(self.width, 1) + 1
        if isinstance(item, Node) and item.role != "assistant" and item.id not in self.unfolded:
            lines = min(lines, _FOLDED_LINES + 1)
        return lines + 2
