"""A and B: one message answered under two settings side by side, streamed together, by the same seed.

The verdict stays in the conversation's tree as votes, and can be added to a file of preference pairs or training rows.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import DescendantFocus
from textual.widgets import Static

from edgetune.chat.conversation import Setting
from edgetune.chat.open_chat import OpenChat
from edgetune.chat.reply import Reply
from edgetune.chat.tree import Tree
from edgetune.engine.sampling import RANDOM_SEED
from edgetune.errors import EdgetuneError
from edgetune.paths import home_dir
from edgetune.tui.compare_settings import side_template
from edgetune.tui.compare_verdict import CompareVerdict
from edgetune.tui.composer import Composer, Entry
from edgetune.tui.controls import ControlList
from edgetune.tui.history import History
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.reply_run import FASTEST, SELDOM, Clock, Pacer, ReplyRun
from edgetune.tui.status import StatusLine
from edgetune.tui.token_panel import TokenPanel
from edgetune.tui.transcript import Transcript
from edgetune.tui.visible import one_line

_WELCOME = "F2 goes to the settings above. Ask below; then a or b says which is better."
_TO_BRANCH = "a or b goes on with a side; then Esc, and Enter on the alternative there."
_SEEDS = 2**31


class CompareScreen(CompareVerdict):
    """Two columns over one input."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (76, "-wide")]  # noqa: RUF012  (as Textual declares it)
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (10, "-low"), (18, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Stop the replies; back to the chat"),
        Binding("ctrl+c", "back", "Stop the replies; back to the chat", show=False),
        Binding("ctrl+t,f4", "token_view", "Replies by their tokens"),
        Binding("f2", "settings", "To the settings"),
        Binding("a", "prefer(0)", "A is better"),
        Binding("b", "prefer(1)", "B is better"),
        Binding("r", "again", "Both answer the last message again, as they are set now"),
        Binding("t", "tokens", "Into the tokens of the reply in focus"),
        Binding("e", "edit", "Write a better answer, from the one in focus"),
        Binding("s", "save('pairs')", "Add the verdict to a file of preference pairs"),
        Binding("S", "save('rows')", "Add the better answer to a file of training rows"),
        Binding("i", "to_input", "To the input"),
        Binding("question_mark", "app.show_keys", "Keys", show=False),
    ]

    def __init__(self, chat: OpenChat) -> None:
        super().__init__(chat)
        self._pacer, self._seldom = Pacer(), Clock(SELDOM)

    def compose(self) -> ComposeResult:
        """Settings over the replies, twice."""
        with Horizontal(id="sides"):
            for number, name in enumerate("AB"):
                with Vertical(classes="compare-side"):
                    yield Static(name, classes="compare-title", id=f"title-{number}", markup=False)
                    yield ControlList(label_width=11, id=f"settings-{number}")
                    yield Transcript(model_name=name, welcome=_WELCOME, id=f"reply-{number}")
        yield TokenPanel(keys="←→ token  ↑↓ other  Esc back", id="tokens")
        yield Composer(
            completer=lambda text: (),
            history=History(home_dir() / "history"),
            placeholder="One message for both; empty asks the last one again",
            id="composer",
        )
        yield StatusLine(id="status")

    def on_mount(self) -> None:
        """Begin to ask."""
        self._frames = self.set_interval(FASTEST, self._frame, pause=True)
        self.begin_settings()
        self.query_one(StatusLine).change(model=self.chat.session.name)
        self.query_one(Entry).focus()

    def key_help(self) -> list[tuple[str, KeyRows]]:
        """What the keys do here."""
        return [
            ("Two settings", key_rows(self.BINDINGS)),
            ("On the replies", [("← →", "Token before, token after"), ("↑ ↓", "What stood beside it")]),
            ("On the settings", key_rows(ControlList.BINDINGS)),
        ]

    # -- replies

    def on_entry_submitted(self, event: Entry.Submitted) -> None:
        """Ask both."""
        event.stop()
        if self.run_now is not None:
            return
        text = event.text.strip()
        if not text and not self.chat.conversation.tree.path():
            return
        composer = self.query_one(Composer)
        if text:
            composer.remember(event.text)
            composer.put("")
        self._ask(event.text if text else None)

    @work
    async def _ask(self, text: str | None) -> None:
        chat, settings, known = self.chat, [replace(one) for one in self.settings], dict(self._known)
        seed = chat.conversation.sampling.seed
        seed = secrets.randbelow(_SEEDS) if seed == RANDOM_SEED else seed

        def make() -> list[Reply]:
            asked = [
                Setting(
                    replace(one.sampling, seed=seed),
                    adapters=(adapters := one.adapters(known)),
                    template=side_template(chat.session, adapters),
                )
                for one in settings
            ]
            return chat.conversation.compare(text, asked)

        self.run_now = waiting = ReplyRun(chat.conversation, [])
        worker = self.edgetune.engine_worker
        try:
            replies = await worker.run(make)
        except (EdgetuneError, OSError) as error:
            self.run_now = None
            self.edgetune.say_error(error)
            return
        self.run_now = run = ReplyRun(chat.conversation, replies)
        self.nodes = [reply.node for reply in replies]
        if waiting.is_cancelled:
            run.cancel()
        for view, live in zip(self._views, run.lives, strict=True):
            view.show(Tree(), live=live)
        self.query_one(StatusLine).change(is_busy=True, warning="")
        self._frames.resume()
        problem: EdgetuneError | OSError | None = None
        try:
            await worker.run(run.pump)
        except (EdgetuneError, OSError) as error:
            problem = error
        self._frames.pause()
        run.look(is_over=True)
        self._show_speed(run)
        self.run_now = None
        self._show_nodes()
        self.query_one(StatusLine).change(is_busy=False)
        if problem is not None:
            self.edgetune.say_error(problem)
        self._views[0].focus()

    def _frame(self) -> None:
        if self.run_now is not None and self.run_now.replies and self._pacer.is_due():
            self.run_now.look()
            for view in self._views:
                view.grow()
            if self._seldom.is_due():
                self._show_speed(self.run_now)

    def _show_speed(self, run: ReplyRun) -> None:
        counts = [len(reply.generation.ids) for reply in run.replies]
        speeds = [reply.timings.tokens_per_second for reply in run.replies]
        self.query_one(StatusLine).change(note=f"A {counts[0]} · B {counts[1]} tokens", speed=sum(speeds))

    # -- keys on the replies

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        """Which side `e` is about."""
        if (name := str(event.widget.id)).startswith(("reply-", "settings-")):
            self._focused_side = int(name[-1])
            self._look_at_token()

    def on_transcript_token_changed(self, event: Transcript.TokenChanged) -> None:
        """Show what a token was chosen from."""
        event.stop()
        self._look_at_token()

    def on_transcript_alternative_moved(self, event: Transcript.AlternativeMoved) -> None:
        """Another alternative."""
        event.stop()
        self.query_one(TokenPanel).move(event.step)

    def on_transcript_alternative_taken(self, event: Transcript.AlternativeTaken) -> None:
        """Branches are the chat's."""
        event.stop()
        self.edgetune.say("Branches are made in the chat.", hint=_TO_BRANCH)

    def on_token_panel_taken(self, event: TokenPanel.Taken) -> None:
        """By mouse."""
        event.stop()
        self.edgetune.say("Branches are made in the chat.", hint=_TO_BRANCH)

    def _look_at_token(self) -> None:
        views = sorted(self._views, key=lambda view: view is not self._views[self._focused_side])
        looked_at = next((view for view in views if view.token is not None), None)
        # A low terminal has no room for the settings as well.
        self.set_class(looked_at is not None, "tokens")
        self.query_one(TokenPanel).look_at(looked_at)

    def on_transcript_wished(self, event: Transcript.Wished) -> None:
        """The keys on a message that mean something here: edit, vote."""
        event.stop()
        if event.wish == "edit":
            self.action_edit()
        elif event.wish in ("up", "down"):
            self.action_prefer(self._focused_side if event.wish == "up" else 1 - self._focused_side)
        elif event.wish == "copy":
            self.app.copy_to_clipboard(event.node.content)
            self.edgetune.say("Copied.")
        elif event.wish == "retry":
            self.action_again()
        elif event.wish in ("previous", "next"):
            self._views[1 - self._focused_side].focus()

    # -- other keys

    def action_back(self) -> None:
        """Stop; else leave."""
        if self.run_now is not None:
            self.run_now.cancel()
        elif sum(view.leave_tokens() for view in self._views) == 0:
            self.dismiss(None)

    def action_again(self) -> None:
        """Ask the last message again."""
        question = next((node for node in reversed(self.chat.conversation.tree.path()) if node.role == "user"), None)
        if self.run_now is not None or question is None:
            self.app.bell()
            return
        self.edgetune.say(f"A and B answer again: {one_line(question.content, length=60)}")
        self._ask(None)

    def action_tokens(self) -> None:
        """From the settings to the tokens."""
        view = self._views[self._focused_side]
        view.focus()
        view.action_enter()

    def action_token_view(self) -> None:
        """Shade the tokens."""
        for view in self._views:
            view.has_token_view = not view.has_token_view

    def action_to_input(self) -> None:
        """To the input."""
        self.query_one(Entry).focus()

    def action_stop_or_leave(self) -> None:
        """Ctrl-C in the input."""
        self.action_back()

    def action_leave(self) -> None:
        """Ctrl-D in the input."""
        self.action_back()
