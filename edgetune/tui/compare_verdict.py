"""The verdict on two replies: a vote, a better answer by hand, rows and pairs for training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from textual import work

from edgetune.chat.open_chat import OpenChat
from edgetune.chat.tree import Node, Tree
from edgetune.errors import EdgetuneError
from edgetune.tui.compare_settings import CompareSettings
from edgetune.tui.dialogs import LineDialog, TextDialog
from edgetune.tui.reply_run import ReplyRun
from edgetune.tui.training_rows import RowKind, append_rows, verdict_rows
from edgetune.tui.transcript import Transcript


class CompareVerdict(CompareSettings):
    """Votes on the replies that are in view."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__(chat)
        self.run_now: ReplyRun | None = None
        self.nodes: list[Node] = []
        """The replies that were made, edited ones after them."""
        self._focused_side = 0

    @property
    def _views(self) -> list[Transcript]:
        return [self.query_one(f"#reply-{number}", Transcript) for number in (0, 1)]

    def _show_nodes(self) -> None:
        for view, node in zip(self._views, self._in_view(), strict=False):
            alone = replace(node, parent=None)
            view.show(Tree([alone], head=alone.id))

    def _in_view(self) -> list[Node]:
        """The reply on each side: the one edited last, where there is one."""
        shown = self.nodes[:2]
        for node in self.nodes[2:]:
            shown = [node if node.meta.get("edited_from") == one.id else one for one in shown]
        return shown

    @work
    async def action_prefer(self, side: int) -> None:
        """Vote one up and the other down, and go on with the better one."""
        nodes = self._in_view()
        if self.run_now is not None or len(nodes) < 2:
            return
        conversation = self.chat.conversation

        def vote() -> None:
            conversation.vote(nodes[side].id, "up")
            conversation.vote(nodes[1 - side].id, "down")
            conversation.select(nodes[side].id)

        await self.edgetune.engine_worker.run(vote)
        self._show_nodes()
        self.edgetune.say(f"{'AB'[side]} is better.", hint="s adds the pair to a file, S the better answer alone.")

    @work
    async def action_edit(self) -> None:
        """A better answer, written by hand."""
        nodes = self._in_view()
        if self.run_now is not None or not nodes:
            return
        node = nodes[min(self._focused_side, len(nodes) - 1)]
        text = await self.app.push_screen_wait(
            TextDialog("A better answer", node.content, note="It is preferred to the one it came from.")
        )
        if text is None or not text.strip() or text == node.content:
            return
        conversation = self.chat.conversation
        await self.edgetune.engine_worker.run(lambda: conversation.edit(node.id, text))
        edited = conversation.tree.path()[-1]
        # The views look for what came from the first two.
        if node in self.nodes[:2]:
            self.nodes.append(edited)
        else:
            self.nodes[self.nodes.index(node)] = edited
        self._show_nodes()

    @work
    async def action_save(self, kind: RowKind) -> None:
        """Add what was decided to a file."""
        rows = verdict_rows(self.chat.conversation.tree, self.nodes, kind=kind, system=self.chat.conversation.system)
        if not rows:
            self.edgetune.say("Nothing is decided yet.", hint="a or b says which is better, e writes a better one.")
            return
        name = await self.app.push_screen_wait(LineDialog(f"Add {len(rows)} {kind} to", value=f"{kind}.jsonl"))
        if not name:
            return
        path = Path(name).expanduser()
        try:
            count = append_rows(path, rows)
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
            return
        note = f" Train on it: edgetune train -d {path}" if kind == "rows" else ""
        self.edgetune.say(f"{count} added to {path}.{note}")
