"""The chat screen: its layout, its keys, the screens it opens, and the way out.

Everything that touches the engine or the conversation goes through the app's one engine thread; the screen looks at the
results. What is seen of a running reply is `reply_run`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from textual import work
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Paste

from edgetune.chat.commands import COMMANDS, complete
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.errors import EdgetuneError, UsageError
from edgetune.paths import home_dir
from edgetune.template import Rendered
from edgetune.tui.bars import CandidateBars
from edgetune.tui.chat_messages import ChatMessages
from edgetune.tui.composer import Composer, Entry
from edgetune.tui.controls import ControlList
from edgetune.tui.history import History
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.side_panel import SidePanel
from edgetune.tui.status import StatusLine
from edgetune.tui.token_panel import TokenPanel
from edgetune.tui.transcript import Transcript
from edgetune.tui.visible import typed

_LOOK_AT_MODEL_S = 2.0


class Beside(Horizontal):
    """Widgets side by side that leave nothing of it in view."""

    BLANK = True


class Below(Vertical):
    """Widgets one below the other that leave nothing of it in view."""

    BLANK = True


class ChatScreen(ChatMessages):
    """One open chat."""

    BLANK = True  # its widgets leave nothing of it in view; drawing it would be work for nothing with every frame
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (76, "-wide")]  # noqa: RUF012  (as Textual declares it)
    VERTICAL_BREAKPOINTS = [(0, "-tiny"), (10, "-low"), (18, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Stop the reply; close what is open; to the input"),
        Binding("ctrl+c", "stop_or_leave", "Stop the reply; copy the marked text"),
        Binding("ctrl+s,f2", "page('sampling')", "Sampling, with the next token's distribution"),
        Binding("ctrl+l,f3", "page('adapters')", "Adapters"),
        Binding("ctrl+t,f4", "token_view", "Replies by their tokens"),
        Binding("ctrl+b,f5", "branches", "The tree of branches"),
        Binding("ctrl+g,f6", "compare", "A and B: two settings side by side"),
        Binding("ctrl+o,f7", "sessions", "Chats: search, resume, rename, delete, export"),
        Binding("f8", "system", "The system prompt"),
        Binding("f9", "templates", "Prompt templates"),
        Binding("ctrl+r", "retry", "Another reply"),
        Binding("ctrl+n", "new", "A new chat"),
        Binding("ctrl+up", "to_messages", "To the messages"),
        Binding("ctrl+d", "leave", "Leave", show=False),
    ]

    def __init__(self, chat: OpenChat, *, first: Outcome | None = None, is_first: bool = True) -> None:
        """Take over `chat`; leaving closes it. `first` is shown first. `is_first`: leaving ends the app."""
        super().__init__(chat)
        self._is_first = is_first
        self._first = first
        self._is_leaving = False

    def compose(self) -> ComposeResult:
        """Conversation and panel over the input over the status."""
        with Beside(id="main"):
            with Below(id="left"):
                yield Transcript(model_name=self.chat.session.name, id="transcript")
                yield TokenPanel(keys="←→ token  ↑↓ other  Enter branches  Esc back", id="tokens")
            yield SidePanel(id="side")
        yield Composer(
            completer=self._complete,
            history=History(home_dir() / "history"),
            placeholder="Message, /command or @file",
            id="composer",
        )
        yield StatusLine(id="status")

    def on_mount(self) -> None:
        """Show what there is, and begin to type."""
        engine = self.chat.session.engine
        self.status.change(
            model=self.chat.session.name, size=engine.context_size, memory=engine.memory.weights + engine.memory.context
        )
        self.side.turn_to("sampling")
        self.composer.entry.focus()
        self.set_interval(_LOOK_AT_MODEL_S, self._check_model)
        self._show()
        self._show_settings()
        if self._first is not None:
            self._take(self._first)
        self._name_control_tokens()
        self._look_ahead()

    def key_help(self) -> list[tuple[str, KeyRows]]:
        """What the keys do here."""
        return [
            ("Anywhere", [*key_rows(self.BINDINGS), ("^P", "Everything, by name"), ("^Q", "Leave at once")]),
            ("In the input", [("?", "This, when nothing is typed"), *key_rows(Entry.BINDINGS)]),
            ("On messages and tokens", key_rows(Transcript.BINDINGS)),
            (
                "On the panel",
                [("0-9 . -", "Type a number"), *key_rows(ControlList.BINDINGS), *key_rows(SidePanel.BINDINGS)],
            ),
        ]

    def palette_commands(self) -> Iterable[SystemCommand]:
        """What the command palette offers: the screen's keys, and the commands of the chat."""
        for binding in self.BINDINGS:
            if isinstance(binding, Binding) and binding.action not in ("back", "stop_or_leave", "leave"):
                text = binding.description
                yield SystemCommand(text, f"Key {key_rows([binding])[0][0]}", lambda a=binding.action: self._act(a))
        for command in COMMANDS:
            # The palette reads markup; what is optional stands in brackets.
            title = f"/{command.name} {command.arguments}".rstrip().replace("[", r"\[")
            help = command.help.replace("[", r"\[")
            yield SystemCommand(title, help, lambda c=command: self._begin_command(c.name, bool(c.arguments)))

    @work(exclusive=False)
    async def _name_control_tokens(self) -> None:
        """Learn what the tokens without a text of their own are called."""
        conversation = self.chat.conversation

        def names() -> dict[int, str]:
            tokenizer, known = conversation.engine.tokenizer, {}
            for name in conversation.template.control_tokens:
                ids = tokenizer.encode_rendered(Rendered(name))
                if len(ids) == 1:
                    known[ids[0]] = name
            return known

        known = await self.on_engine(names)
        for bars in self.query(CandidateBars):
            bars.names = known
            bars.refresh()

    def on_paste(self, event: Paste) -> None:
        """What is pasted is meant for the input, wherever the keys go."""
        self.composer.entry.focus()
        self.composer.entry.insert(typed(event.text))

    def action_back(self) -> None:
        """Stop; else close what is open; else go to the input."""
        if self.composer.close():
            return
        if self.run_now is not None:
            self.run_now.cancel()
        elif self.transcript.leave_tokens():
            pass
        elif self.side.has_class("open") and self.side.has_focus_within:
            self._close_side()
        else:
            self.composer.entry.focus()

    def action_stop_or_leave(self) -> None:
        """Ctrl-C."""
        if selected := self.get_selected_text():
            self.app.copy_to_clipboard(selected)
            self.clear_selection()
            self.edgetune.say("Copied.")
        elif self.run_now is not None:
            self.run_now.cancel()
        elif self.composer.entry.text:
            self.composer.put("")
        else:
            self.edgetune.say("^D leaves.")

    def action_token_view(self) -> None:
        """Show replies by their tokens, or as they are meant."""
        self.transcript.leave_tokens()
        self.transcript.has_token_view = not self.transcript.has_token_view

    def action_to_messages(self) -> None:
        """Into the conversation."""
        self.transcript.focus()

    def action_new(self) -> None:
        """Begin anew."""
        if self.run_now is None:
            self.run_line("/clear")

    def action_system(self) -> None:
        """Edit the system prompt."""
        self._edit_system()

    @work(exclusive=False)
    async def _edit_system(self) -> None:
        from edgetune.tui.dialogs import TextDialog

        conversation = self.chat.conversation
        note = "Empty leaves it to the model's template. It counts from the next message on."
        text = await self.app.push_screen_wait(TextDialog("System prompt", conversation.system, note=note))
        if text is not None:
            conversation.system = text.strip()
            self._look_ahead()

    def action_templates(self) -> None:
        """Choose, write or delete a prompt template."""
        from edgetune.tui.templates import TemplatesScreen

        def use(text: str | None) -> None:
            if text:
                self.composer.put(text)
                self.composer.entry.focus()

        self.app.push_screen(TemplatesScreen(), use)

    def action_branches(self) -> None:
        """Walk the tree."""
        from edgetune.tui.branches import BranchesScreen

        if self.refuse_if_busy():
            return

        def walk(node_id: str | None) -> None:
            if node_id:
                self.run_worker(self.go_to(self.chat.conversation.tree.node(node_id)))

        self.app.push_screen(BranchesScreen(self.chat.conversation.tree), walk)

    def action_compare(self) -> None:
        """Two settings side by side."""
        from edgetune.tui.compare import CompareScreen

        if self.refuse_if_busy():
            return
        self.app.push_screen(CompareScreen(self.chat), lambda _: self._come_back())

    def action_sessions(self) -> None:
        """The chats that are kept."""
        from edgetune.tui.sessions import SessionsScreen

        if self.refuse_if_busy():
            return
        try:
            database = self.chat.database
        except UsageError as error:
            self.edgetune.say_error(error)
            return

        def resume(session_id: str | None) -> None:
            if session_id:
                self.run_line(f"/resume {session_id}")

        self.app.push_screen(SessionsScreen(self.chat, database), resume)

    def _come_back(self) -> None:
        self._notices = []
        self._show()
        self._show_settings()
        self._look_ahead()

    def action_leave(self) -> None:
        """Write what is not written, and go."""
        if not self._is_leaving:
            self._is_leaving = True
            self._leave()

    @work(exclusive=False)
    async def _leave(self) -> None:
        if self.run_now is not None:
            self.run_now.cancel()
        self.edgetune.say("Saving the chat …")
        chat = self.chat

        def close() -> None:
            try:
                chat.close()
            finally:
                chat.session.engine.close()

        try:
            await self.on_engine(close)
        except (EdgetuneError, OSError) as error:
            if self._is_first:
                self.edgetune.fail(error)
                return
            self.edgetune.say_error(error)
        if self._is_first:
            self.app.exit()
        else:
            self.app.pop_screen()

    def _complete(self, text: str) -> Iterator[tuple[str, int, str]]:
        helps = {f"/{command.name}": command.help for command in COMMANDS}
        try:
            for word, start in complete(self.chat, text):
                yield word, start, helps.get(word, "")
        except EdgetuneError:
            return

    def _act(self, action: str) -> None:
        self.call_later(self.run_action, action)

    def _begin_command(self, name: str, has_arguments: bool) -> None:
        if has_arguments:
            self.composer.put(f"/{name} ")
            self.composer.entry.focus()
        else:
            self.run_line(f"/{name}")
