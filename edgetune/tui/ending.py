"""A screen's end: its workers are cancelled before its widgets go.

Textual takes the widgets first and cancels afterwards; a worker that wakes between the two looks for widgets that are
no longer there, and the app ends with that error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from textual.dom import DOMNode
else:
    DOMNode = object


class EndsWorkers(DOMNode):
    """Mixed into every screen that has workers."""

    def _on_prune(self) -> None:
        self.workers.cancel_node(self)
