"""What every part of the chat screen stands on: the chat, the reply that is being made, and the widgets.

The screen's parts build on each other: `chat_base` ← `chat_outlook` ← `chat_settings` ← `chat_replies` ←
`chat_messages` ← `chat`, which has the layout and the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from textual.screen import Screen

from edgetune.chat.open_chat import OpenChat
from edgetune.tui.composer import Composer
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.live import Notice
from edgetune.tui.reply_run import ReplyRun
from edgetune.tui.side_panel import SidePanel
from edgetune.tui.status import StatusLine
from edgetune.tui.token_panel import TokenPanel
from edgetune.tui.transcript import Transcript

if TYPE_CHECKING:
    from edgetune.tui.app import EdgetuneApp

T = TypeVar("T")
TOP = 10
"""How many alternatives are recorded for each token."""


class ChatBase(EndsWorkers, Screen[None]):
    """The state that the parts share."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__()
        self.chat = chat
        self.chat.conversation.top = self.chat.conversation.top or TOP
        self.run_now: ReplyRun | None = None
        """The reply that is being made."""
        self._notices: list[Notice] = []

    @property
    def edgetune(self) -> EdgetuneApp:
        """The app."""
        from edgetune.tui.app import EdgetuneApp

        assert isinstance(self.app, EdgetuneApp)
        return self.app

    @property
    def transcript(self) -> Transcript:
        """The conversation."""
        return self.query_one(Transcript)

    @property
    def tokens(self) -> TokenPanel:
        """What a token was chosen from."""
        return self.query_one(TokenPanel)

    @property
    def composer(self) -> Composer:
        """Where one types."""
        return self.query_one(Composer)

    @property
    def side(self) -> SidePanel:
        """The panel."""
        return self.query_one(SidePanel)

    @property
    def status(self) -> StatusLine:
        """The last line."""
        return self.query_one(StatusLine)

    async def on_engine(self, work: Callable[[], T]) -> T:
        """The value of `work`, run on the engine's thread."""
        return await self.edgetune.engine_worker.run(work)

    def _show(self, *, follow: bool = True) -> None:
        live = self.run_now.lives[0] if self.run_now is not None and self.run_now.lives else None
        self.transcript.show(self.chat.conversation.tree, notices=self._notices, live=live, follow=follow)

    def _note(self, text: str, *, is_problem: bool = False) -> None:
        self._notices.append(Notice(text, self.chat.conversation.tree.head, is_problem=is_problem))
        self._show()

    def refuse_if_busy(self) -> bool:
        """Whether a reply is being made; says so."""
        if self.run_now is not None:
            self.edgetune.say("The reply is still being made.", hint="Esc stops it; what was said stays.")
        return self.run_now is not None
