"""What the chat screen sees coming: the context's fill, the next token's distribution, a model file that is gone."""

from __future__ import annotations

from pathlib import Path

from textual import work

from edgetune.chat.open_chat import OpenChat
from edgetune.errors import EdgetuneError
from edgetune.tui.chat_base import ChatBase

_PLOTTED = 40
_SHORT_MESSAGE = "Please tell me more about that."
"""Stands for the next message, to see whether the context has room for one."""


class ChatOutlook(ChatBase):
    """Looks ahead between replies, and at the model's file and the saving all the time."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__(chat)
        self._problem: EdgetuneError | None = None
        self._model_stamp = _stamp(chat.session.engine.path)
        self._warnings: dict[str, str] = {}

    @work(exclusive=True, group="look ahead")
    async def _look_ahead(self) -> None:
        """What the next message will find, and the next token's distribution; both when the engine has time."""
        conversation, engine = self.chat.conversation, self.chat.session.engine
        try:
            forecasts = await self.edgetune.engine_worker.run_latest(
                "forecast", lambda: (conversation.forecast(), conversation.forecast(_SHORT_MESSAGE))
            )
        except (EdgetuneError, OSError):
            forecasts = None
        if forecasts is not None and self.run_now is None:
            now, forecast = forecasts
            warning = ""
            if forecast.refused:
                warning = "context full: the next message is refused"
            elif forecast.dropped_turns:
                turns = "turn" if forecast.dropped_turns == 1 else f"{forecast.dropped_turns} turns"
                warning = f"the next message drops the oldest {turns}"
            self.status.change(tokens=min(now.tokens, now.size))
            self._warn("context", warning)
        if self.plot_token():
            return
        if self.side.has_class("open") and self.run_now is None:
            sampling = conversation.sampling
            candidates = await self.edgetune.engine_worker.run_latest(
                "plot", lambda: engine.distribution(sampling, top=_PLOTTED)
            )
            if candidates is not None and self.run_now is None and self.tokens.choice is None:
                self.side.show_candidates(candidates)

    def plot_token(self) -> bool:
        """Plot what the token under the cursor was chosen from; whether there is one."""
        choice = self.tokens.choice
        if choice is not None and self.side.has_class("open"):
            self.side.show_candidates(choice.alternatives, chosen=choice.id)
        return choice is not None

    def _warn(self, kind: str, text: str) -> None:
        self._warnings[kind] = text
        self.status.change(warning=next((warning for warning in self._warnings.values() if warning), ""))

    def _check_model(self) -> None:
        path = self.chat.session.engine.path
        if _stamp(path) != self._model_stamp:
            gone = not path.exists()
            self._warn("model", "the model's file is gone" if gone else "the model's file is another one now")
        elif self._warnings.get("model"):
            self._warn("model", "")
        self._check_saving()

    def _check_saving(self) -> None:
        problem = self.chat.autosave.problem if self.chat.autosave is not None else None
        if problem is not None and self._problem is None:
            hint = f"{problem.message} The chat goes on; what was said is written when that works again."
            self.edgetune.say("Not saved", hint=hint, severity="warning")
        self._problem = problem
        self._warn("saving", "not saved" if problem is not None else "")


def _stamp(path: Path) -> tuple[int, int, float] | None:
    """What tells a file from another one in its place."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime
