"""An open chat, what commands work on, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgetune.chat.attachments import attach_files
from edgetune.chat.autosave import Autosave
from edgetune.chat.conversation import Conversation
from edgetune.chat.database import ChatDatabase
from edgetune.chat.reply import Reply
from edgetune.chat.session import Session
from edgetune.chat.tree import Node
from edgetune.errors import EdgetuneError, UsageError


@dataclass(frozen=True)
class Outcome:
    """What a command did, for whoever shows it."""

    text: str = ""
    """Lines for people."""
    rows: tuple[tuple[str, str], ...] = ()
    """A table of two columns, after the text."""
    reply: Reply | None = None
    """A reply to be run and shown."""
    draft: str = ""
    """What the input begins with next, to be edited and sent."""
    moved: bool = False
    """Whether the history is another one than before."""
    leaves: bool = False
    """Whether the chat is over."""


class OpenChat:
    """An open model, a conversation with it, and where that is kept."""

    def __init__(
        self,
        session: Session,
        conversation: Conversation,
        *,
        database: ChatDatabase | None = None,
        save: bool = True,
        on_problem: Callable[[EdgetuneError], None] = lambda error: None,
    ) -> None:
        """`save` keeps what is said in `database`, the home's by default; `on_problem` hears when that fails."""
        self.session = session
        self.conversation = conversation
        self.autosave = Autosave(session, database=database, on_problem=on_problem) if save else None
        """None when nothing is kept."""
        conversation.recorder = self.autosave
        self.keys: tuple[tuple[str, str], ...] = ()
        """(key, what it does) of the front end, for /help."""

    def __enter__(self) -> OpenChat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the chat: what has to be kept of it is written."""
        if self.autosave is not None:
            self.autosave.leave(self.conversation)
            self.autosave.database.close()

    @property
    def database(self) -> ChatDatabase:
        """Where chats are kept. Raises `UsageError` when this one is not."""
        return self.saving.database

    @property
    def saving(self) -> Autosave:
        """Who keeps this chat. Raises `UsageError` when nobody does."""
        if self.autosave is None:
            raise UsageError("This chat is not kept.", hint="Start it without --no-save.")
        return self.autosave

    def say(self, text: str) -> Reply:
        """Say `text`, with the files it names as `@path`; see `Conversation.ask`."""
        return self.conversation.ask(attach_files(text))

    def last(self, role: str) -> Node:
        """The latest message of `role` in the history. Raises `UsageError` when there is none."""
        found = [node for node in self.conversation.tree.path() if node.role == role]
        if not found:
            raise UsageError("There is no reply yet." if role == "assistant" else "Nothing was said yet.")
        return found[-1]

    def leave_tree(self) -> None:
        """Keep what the conversation is about to forget."""
        if self.autosave is not None:
            self.autosave.leave(self.conversation)
