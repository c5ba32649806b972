"""Writes a conversation into the database as it goes on; when that fails, the chat goes on without, and says so.

What could not be written is kept and written the next time that works. The KV state is saved when a chat is left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgetune.chat.conversation import Conversation
from edgetune.chat.database import ChatDatabase, SavedSession, new_session_id, title_of
from edgetune.chat.presets import changes, with_changes
from edgetune.chat.reply import Reply
from edgetune.chat.session import Session
from edgetune.chat.tree import Node, Tree
from edgetune.errors import EdgetuneError

_EVERY_TOKENS = 16
_EVERY_SECONDS = 0.5


class Autosave:
    """The recorder of a conversation; see `conversation.Recorder`."""

    def __init__(
        self,
        session: Session,
        *,
        database: ChatDatabase | None = None,
        on_problem: Callable[[EdgetuneError], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`session` tells model and adapters; `on_problem` hears of the first failure of a row of them."""
        self.database = database or ChatDatabase()
        """Where chats are kept."""
        self.session_id = new_session_id()
        """The chat that is being written."""
        self.problem: EdgetuneError | None = None
        """Why the last write failed; None while all is well."""
        self._session, self._on_problem, self._clock = session, on_problem, clock
        self._tree: Tree | None = None
        self._unsaved: dict[str, Node] = {}
        self._blocks: dict[str, tuple[int, float]] = {}

    def heard(self, conversation: Conversation, reply: Reply) -> None:
        """Write `reply` when a block of it is complete."""
        tokens, now = len(reply.generation.ids), self._clock()
        last_tokens, last_time = self._blocks.setdefault(reply.node.id, (0, now))
        if tokens - last_tokens < _EVERY_TOKENS and now - last_time < _EVERY_SECONDS:
            return
        self._blocks[reply.node.id] = (tokens, now)
        # A disk that is full, or a lock that is held, must not slow down every block.
        if self.problem is None:
            reply.update()
            self._write(conversation, reply.node)

    def changed(self, conversation: Conversation, *nodes: Node) -> None:
        """Write `nodes` and what is not written yet."""
        for node in nodes:
            self._blocks.pop(node.id, None)
        self._write(conversation, *nodes)

    def resume(self, conversation: Conversation, saved: SavedSession) -> int:
        """Go on with a chat of the database; returns how many tokens of its KV state could be taken up.

        Its system prompt and sampling come with it; model and adapters are the caller's to compare.
        """
        tree = self.database.load(saved.id)
        sampling = with_changes(saved.sampling)
        self.leave(conversation)
        self.session_id, self._tree, self._unsaved = saved.id, tree, {}
        conversation.system, conversation.sampling = saved.system, sampling
        conversation.open(tree)
        path = self.database.states.path(saved.id)
        return self._session.engine.load_state(path, conversation.history_ids()) if path.exists() else 0

    def leave(self, conversation: Conversation) -> None:
        """The chat is left: write what is not written, and its KV state for the next time."""
        if self._tree is not conversation.tree or not conversation.tree.nodes:
            return
        self._write(conversation)
        if self.problem is None:
            self._save_state()

    def _save_state(self) -> None:
        engine = self._session.engine
        expected = engine.cached_tokens * engine.memory.per_token
        # Where that fails nothing is lost: the history is evaluated the next time.
        with suppress(EdgetuneError, OSError):
            if expected and self.database.states.make_room(self.session_id, expected):
                engine.save_state(self.database.states.path(self.session_id))

    def _write(self, conversation: Conversation, *nodes: Node) -> None:
        if self._tree is not conversation.tree:
            self._begin(conversation.tree)
        if self.database.was_replaced():
            self._unsaved = dict(conversation.tree.nodes)
        self._unsaved.update((node.id, node) for node in nodes)
        if not conversation.tree.nodes:
            return
        try:
            head = conversation.tree.head
            self.database.save(self._describe(conversation), list(self._unsaved.values()), head=head)
        except EdgetuneError as error:
            self._report(error)
            return
        self.problem = None
        self._unsaved.clear()

    def _begin(self, tree: Tree) -> None:
        self.session_id, self._tree, self._blocks = new_session_id(), tree, {}
        self._unsaved = dict(tree.nodes)

    def _report(self, error: EdgetuneError) -> None:
        if self.problem is None:
            self._on_problem(error)
        self.problem = error

    def _describe(self, conversation: Conversation) -> SavedSession:
        first = next((node for node in conversation.tree.nodes.values() if node.role == "user"), None)
        return SavedSession(
            id=self.session_id,
            title=title_of(first.content) if first else "",
            model=str(self._session.engine.path),
            fingerprint=self._session.fingerprint,
            adapters=tuple(_plain(one.path, one.scale) for one in self._session.engine.adapters),
            system=conversation.system,
            sampling=changes(conversation.sampling),
        )


def _plain(path: Path, scale: float) -> dict[str, object]:
    return {"path": str(path), "scale": scale}
