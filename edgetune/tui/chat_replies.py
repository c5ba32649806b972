"""Saying something on the chat screen: commands and messages, and a reply from its first token to its last."""

from __future__ import annotations

from collections.abc import Callable

from textual import work

from edgetune.chat.commands import run_command
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.reply import Reply
from edgetune.errors import EdgetuneError
from edgetune.tui.chat_settings import ChatSettings
from edgetune.tui.composer import Entry
from edgetune.tui.live import Live
from edgetune.tui.reply_run import FASTEST, SELDOM, Clock, Pacer, ReplyRun

_AT_ONCE = frozenset({"temp", "set", "preset", "help"})
"""Commands that need no engine: they work while a reply runs."""


class ChatReplies(ChatSettings):
    """Runs what was typed, and draws the reply while it is made."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__(chat)
        self._pacer, self._seldom = Pacer(), Clock(SELDOM)

    def on_mount(self) -> None:
        """The clock for frames."""
        self._frames = self.set_interval(FASTEST, self._frame, pause=True)

    def on_entry_submitted(self, event: Entry.Submitted) -> None:
        """A message or a command."""
        event.stop()
        text = event.text
        if not text.strip():
            return
        is_command = text.startswith("/")
        if self.run_now is not None and not (is_command and text[1:].split(" ")[0] in _AT_ONCE):
            self.edgetune.say("The reply is still being made.", hint="Esc stops it; what was said stays.")
            return
        self.composer.remember(text)
        self.composer.put("")
        if is_command:
            self.run_line(text)
        else:
            self.answer(lambda: self.chat.say(text), draft=text)

    @work(exclusive=False)
    async def run_line(self, line: str) -> None:
        """Run a command and show what it says."""
        await self._run_line(line)

    async def _run_line(self, line: str) -> None:
        try:
            if line[1:].split(" ")[0] in _AT_ONCE:
                outcome = run_command(self.chat, line)
            else:
                outcome = await self.on_engine(lambda: run_command(self.chat, line))
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
            self.composer.put(line)
            return
        self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        if outcome.leaves:
            self.call_later(self.run_action, "leave")
            return
        width = max((len(left) for left, _ in outcome.rows), default=0)
        lines = [*outcome.text.splitlines(), *(f"{left:<{width}}  {right}" for left, right in outcome.rows)]
        if outcome.moved:
            self._notices = []
        if lines:
            self._note("\n".join(lines))
        if outcome.draft:
            self.composer.put(outcome.draft)
            self.composer.entry.focus()
        self._apply_sampling(self.chat.conversation.sampling)
        self._show_settings()
        if outcome.reply is not None:
            reply = outcome.reply
            self.answer(lambda: reply)
        else:
            self._show()
            self._look_ahead()

    @work(exclusive=False)
    async def answer(self, make: Callable[[], Reply], *, draft: str = "", token: int | None = None) -> None:
        """Let a reply be made and show it; `draft` goes back into the input when it cannot be."""
        if self.run_now is not None:
            return
        conversation = self.chat.conversation
        # Before the first wait, so that no second reply begins beside this one.
        self.run_now = waiting = ReplyRun(conversation, [])
        try:
            reply = await self.on_engine(make)
        except (EdgetuneError, OSError) as error:
            self.run_now = None
            self.edgetune.say_error(error)
            if draft and not self.composer.entry.text:
                self.composer.put(draft)
            self._show()
            return
        if reply.dropped_turns:
            turns = "turn leaves" if reply.dropped_turns == 1 else f"{reply.dropped_turns} turns leave"
            self._note(f"The context is full: the oldest {turns} it.", is_problem=True)
        self.run_now = run = ReplyRun(conversation, [reply])
        if waiting.is_cancelled:
            run.cancel()
        self.transcript.show(conversation.tree, notices=self._notices, live=run.lives[0])
        if token is not None:
            self.transcript.leave_tokens()
            self.transcript.scroll_end(animate=False)
        self.status.change(is_busy=True)
        self._frames.resume()
        problem: EdgetuneError | OSError | None = None
        try:
            worker = self.edgetune.engine_worker
            await self.on_engine(lambda: run.pump(worker.between_tokens))
        except (EdgetuneError, OSError) as error:
            problem = error
        self._frames.pause()
        run.look(is_over=True)
        self.run_now = None
        self._show_speed(reply)
        self.status.change(is_busy=False)
        if problem is not None:
            self.edgetune.say_error(problem)
        elif reply.finish_reason == "interrupted" and not reply.text:
            self.edgetune.say("Stopped before the first word; the turn is taken back.")
            if draft and not self.composer.entry.text:
                self.composer.put(draft)
        elif reply.context_full:
            self._note(
                "The context is full: the reply was cut. The oldest turns leave it with the next message.",
                is_problem=True,
            )
        self._show(follow=self.transcript.token is None)
        if token is not None and self.transcript.has_token_view:
            self.transcript.place_token(reply.node, min(token, max(len(reply.node.choices) - 1, 0)))
        self._check_saving()
        self._look_ahead()

    def _frame(self) -> None:
        run = self.run_now
        if run is None or not run.replies or not self._pacer.is_due():
            return
        run.look()
        self.transcript.grow()
        if self._seldom.is_due():
            self._show_speed(run.replies[0])
            self._plot(run.lives[0])

    def _plot(self, live: Live) -> None:
        if self.side.has_class("open") and live.choices:
            last = live.choices[-1]
            self.side.show_candidates(last.alternatives, chosen=last.id)

    def _show_speed(self, reply: Reply) -> None:
        timings = reply.timings
        if timings.generated_tokens:
            self.status.change(
                speed=timings.tokens_per_second,
                first_token=timings.first_token_seconds,
                tokens=min(timings.prompt_tokens + len(reply.generation.ids), self.status.status.size),
            )
