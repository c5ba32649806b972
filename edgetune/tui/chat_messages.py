"""What the keys on messages and tokens do on the chat screen: edit, vote, walk to another branch, make one."""

from __future__ import annotations

from typing import Any

from textual import work

from edgetune.chat.reply import Reply
from edgetune.chat.tree import Node
from edgetune.errors import EdgetuneError
from edgetune.tui.chat_replies import ChatReplies
from edgetune.tui.token_panel import TokenPanel
from edgetune.tui.transcript import Transcript


class ChatMessages(ChatReplies):
    """Does what the conversation's widget asks for."""

    def on_transcript_wished(self, event: Transcript.Wished) -> None:
        """A key on a message."""
        event.stop()
        node = event.node
        if event.wish == "copy":
            self.app.copy_to_clipboard(node.content)
            self.edgetune.say("Copied.")
        elif self.refuse_if_busy():
            return
        elif event.wish in ("previous", "next"):
            self._to_sibling(node, -1 if event.wish == "previous" else 1)
        elif event.wish == "retry":
            self.action_retry()
        elif event.wish == "edit":
            self._edit(node)
        elif event.wish in ("up", "down"):
            self._vote(node, event.wish)

    def action_retry(self) -> None:
        """Another reply to the last message."""
        self.answer(self.chat.conversation.retry)

    @work(exclusive=False)
    async def _to_sibling(self, node: Node, step: int) -> None:
        conversation = self.chat.conversation
        siblings = conversation.siblings(node.id)
        at = next(number for number, one in enumerate(siblings) if one.id == node.id) + step
        if not 0 <= at < len(siblings):
            self.app.bell()
            return
        await self.go_to(siblings[at])

    async def go_to(self, node: Node) -> None:
        """Walk to the branch that `node` is on."""
        conversation, cursor = self.chat.conversation, self.transcript.cursor
        await self.on_engine(lambda: conversation.select(node.id))
        self._notices = []
        self._show(follow=False)
        self.transcript.put_cursor(node, near=cursor)
        self._look_ahead()

    @work(exclusive=False)
    async def _edit(self, node: Node) -> None:
        from edgetune.tui.dialogs import TextDialog

        is_reply = node.role == "assistant"
        title, note = "Edit the message", "It becomes a branch of its own; the old one stays."
        if is_reply:
            title, note = "Edit the reply", f"{note} It can be learned from: /export rows."
        text = await self.app.push_screen_wait(TextDialog(title, node.content, note=note))
        if text is None or text == node.content or not text.strip():
            return
        conversation = self.chat.conversation
        if not is_reply:
            self.answer(lambda: _demand(conversation.edit(node.id, text)))
            return
        try:
            await self.on_engine(lambda: conversation.edit(node.id, text))
        except EdgetuneError as error:
            self.edgetune.say_error(error)
        self._show()
        self._look_ahead()

    @work(exclusive=False)
    async def _vote(self, node: Node, vote: str) -> None:
        conversation = self.chat.conversation
        wanted: Any = "" if node.meta.get("vote") == vote else vote
        try:
            await self.on_engine(lambda: conversation.vote(node.id, wanted))
        except EdgetuneError as error:
            self.edgetune.say_error(error)
        self._show(follow=False)

    def on_transcript_token_changed(self, event: Transcript.TokenChanged) -> None:
        """Show what a token was chosen from, in the panel's plot as well."""
        event.stop()
        self.tokens.look_at(self.transcript if event.node is not None else None)
        if event.node is None:
            self._look_ahead()
        else:
            self.plot_token()

    def on_transcript_alternative_moved(self, event: Transcript.AlternativeMoved) -> None:
        """Another alternative."""
        event.stop()
        self.tokens.move(event.step)

    def on_transcript_alternative_taken(self, event: Transcript.AlternativeTaken) -> None:
        """Branch."""
        event.stop()
        self._branch()

    def on_token_panel_taken(self, event: TokenPanel.Taken) -> None:
        """Branch, by mouse."""
        event.stop()
        self._branch()

    def _branch(self) -> None:
        node, token, taken = self.transcript.selected, self.transcript.token, self.tokens.alternative
        if node is None or token is None or taken is None:
            self.app.bell()
            return
        if self.refuse_if_busy():
            return
        if taken.id == node.ids[token]:
            self.edgetune.say("That is the token that was taken.", hint="Choose another one with ↑ and ↓.")
            return
        conversation = self.chat.conversation
        self.answer(lambda: conversation.branch(node.id, token, taken.id), token=token)


def _demand(reply: Reply | None) -> Reply:
    assert reply is not None
    return reply
