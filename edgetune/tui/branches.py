"""The conversation's tree, to be walked: every branch, where one is, what was said on it."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Tree as TreeWidget
from textual.widgets.tree import TreeNode

from edgetune.chat.tree import Node, Tree
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.palette import Palette
from edgetune.tui.visible import one_line

_SHOWN = 70


class BranchesScreen(ModalScreen["str | None"]):
    """Returns the message to go to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
    ]

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self._messages = tree

    def compose(self) -> ComposeResult:
        """The tree in a window."""
        with Vertical(classes="dialog text-dialog") as box:
            box.border_title = f"Branches ({len(self._messages.leaves())})"
            box.border_subtitle = "Enter goes there, Esc closes"
            widget: TreeWidget[str] = TreeWidget("the beginning")
            widget.show_root = True
            widget.auto_expand = False
            widget.guide_depth = 2
            yield widget

    def key_help(self) -> list[tuple[str, KeyRows]]:
        """What the keys do here."""
        return [
            ("Branches", [("↑ ↓", "The message above, below"), ("Enter", "Go on from there"), *key_rows(self.BINDINGS)])
        ]

    def on_mount(self) -> None:
        """Fill it, and stand where the conversation is."""
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._draw())
        self._draw()
        self.query_one(TreeWidget).focus()

    def _draw(self) -> None:
        widget = self.query_one(TreeWidget)
        here = {node.id for node in self._messages.path()}
        widget.root.remove_children()
        widget.root.expand()
        at = self._fill(widget.root, None, here, Palette.of(self.app))
        self.call_after_refresh(lambda: widget.move_cursor(at or widget.root))

    def _fill(
        self, parent: TreeNode[str], node_id: str | None, here: set[str], palette: Palette
    ) -> TreeNode[str] | None:
        """Add what follows; returns where the conversation is. A line without branches stays on one level."""
        found = None
        waiting: list[tuple[TreeNode[str], str | None]] = [(parent, node_id)]
        while waiting:
            under, key = waiting.pop()
            children = self._messages.children(key)
            for child in children:
                label = self._label(child, here, palette)
                follows = self._messages.children(child.id)
                if len(children) > 1 and follows:
                    below = under.add(label, data=child.id, expand=True)
                    waiting.append((below, child.id))
                    drawn = below
                else:
                    drawn = under.add_leaf(label, data=child.id)
                    if follows:
                        waiting.append((under, child.id))
                if child.id == self._messages.head:
                    found = drawn
        return found

    def _label(self, node: Node, here: set[str], palette: Palette) -> Text:
        is_here = node.id in here
        mark = "● " if node.id == self._messages.head else "│ " if is_here else "  "
        who = {"user": "you", "assistant": "model"}.get(node.role, node.role)
        text = Text(mark, palette.ink("accent", bold=True))
        text.append(f"{who} ", palette.ink("accent" if node.role == "user" else "primary", bold=is_here))
        text.append(
            one_line(node.content, length=_SHOWN) or "…", palette.ink("foreground") if is_here else palette.muted
        )
        if vote := node.meta.get("vote"):
            text.append(" ▲" if vote == "up" else " ▼", palette.ink("success" if vote == "up" else "error"))
        return text

    def on_tree_node_selected(self, event: TreeWidget.NodeSelected[str]) -> None:
        """Go to the message that was chosen."""
        if event.node.data is not None:
            self.dismiss(event.node.data)
