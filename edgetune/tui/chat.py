"""The chat screen: conversation, input, panels, and what every key in it does.

Everything that touches the engine or the conversation goes through the app's one engine thread; the screen looks at the
results. What is seen of a running reply is `reply_run`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from textual import work
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Static

from edgetune.chat.adapters import find_adapter
from edgetune.chat.commands import COMMANDS, complete, run_command
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.presets import apply_preset, delete_preset, load_presets, save_preset
from edgetune.chat.reply import Reply
from edgetune.chat.session import adapter_name
from edgetune.chat.tree import Node
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError, UsageError
from edgetune.paths import home_dir
from edgetune.template import Rendered
from edgetune.tui.adapter_list import fitting_adapters
from edgetune.tui.bars import CandidateBars, percent
from edgetune.tui.composer import Composer, Entry
from edgetune.tui.controls import ControlList
from edgetune.tui.history import History
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.reply_run import FASTEST, Pacer, ReplyRun
from edgetune.tui.sampling_controls import CUSTOM, MAX_TOKENS, PRESET, changed
from edgetune.tui.side_panel import ListedAdapter, Page, SidePanel
from edgetune.tui.status import StatusLine
from edgetune.tui.transcript import Notice, Transcript
from edgetune.tui.visible import one_line, token_text

if TYPE_CHECKING:
    from edgetune.tui.app import EdgetuneApp

T = TypeVar("T")

_TOP = 10
"""How many alternatives are recorded for each token."""
_PLOTTED = 40
_LOOK_AT_MODEL_S = 2.0
_SHORT_MESSAGE = "Please tell me more about that."
"""Stands for the next message, to see whether the context has room for one."""
_AT_ONCE = frozenset({"temp", "set", "preset", "help"})
"""Commands that need no engine: they work while a reply runs."""


class ChatScreen(Screen[None]):
    """One open chat."""

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
        super().__init__()
        self.chat = chat
        self.chat.conversation.top = self.chat.conversation.top or _TOP
        self.run_now: ReplyRun | None = None
        """The reply that is being made."""
        self._is_first = is_first
        self._first = first
        self._notices: list[Notice] = []
        self._pacer = Pacer()
        self._preset = _preset_of(chat)
        self._alternative = 0
        self._problem: EdgetuneError | None = None
        self._model_stamp = _stamp(chat.session.engine.path)
        self._warnings: dict[str, str] = {}
        self._is_leaving = False

    # -- layout

    def compose(self) -> ComposeResult:
        """Conversation and panel over the input over the status."""
        with Horizontal(id="main"):
            with Vertical(id="left"):
                yield Transcript(model_name=self.chat.session.name, id="transcript")
                with Vertical(id="tokens"):
                    yield Static("", id="tokens-title", markup=False)
                    yield CandidateBars(rows=8, id="alternatives")
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
        self._frames = self.set_interval(FASTEST, self._frame, pause=True)
        self._show()
        self._show_settings()
        if self._first is not None:
            self._take(self._first)
        self._name_control_tokens()
        self._look_ahead()

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
            title = f"/{command.name} {command.arguments}".rstrip()
            yield SystemCommand(title, command.help, lambda c=command: self._begin_command(c.name, bool(c.arguments)))

    # -- saying something

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
            self.action_leave()
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
            self._follow_token(run, token)
        self.status.change(is_busy=True)
        self._frames.resume()
        problem: EdgetuneError | OSError | None = None
        try:
            await self.on_engine(run.pump)
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
        reply, live = run.replies[0], run.lives[0]
        self._show_speed(reply)
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

    # -- what is shown

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

    def _show(self, *, follow: bool = True) -> None:
        live = self.run_now.lives[0] if self.run_now is not None and self.run_now.lives else None
        self.transcript.show(self.chat.conversation.tree, notices=self._notices, live=live, follow=follow)

    def _note(self, text: str, *, is_problem: bool = False) -> None:
        self._notices.append(Notice(text, self.chat.conversation.tree.head, is_problem=is_problem))
        self._show()

    def _show_settings(self) -> None:
        conversation, session = self.chat.conversation, self.chat.session
        try:
            presets = list(load_presets(session.name))
        except EdgetuneError as error:
            self.edgetune.say_error(error)
            presets = []
        if self._preset not in presets:
            self._preset = ""
        self.side.show_sampling(
            conversation.sampling, max_tokens=conversation.max_tokens, preset=self._preset, presets=presets
        )
        names = [
            f"{name}{'' if spec.scale == 1 else f' {spec.scale:g}'}"
            for name, spec in session.adapter_names().items()
            if spec.scale
        ]
        self.status.change(adapters=", ".join(names))

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
        if self.side.has_class("open") and self.run_now is None and self.transcript.token is None:
            sampling = conversation.sampling
            candidates = await self.edgetune.engine_worker.run_latest(
                "plot", lambda: engine.distribution(sampling, top=_PLOTTED)
            )
            if candidates is not None and self.run_now is None:
                self.side.show_candidates(candidates)

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

    # -- sampling and adapters

    def on_control_list_changed(self, event: ControlList.Changed) -> None:
        """A slider, a choice or a switch."""
        event.stop()
        if event.source.id == "adapters":
            self._change_adapter(Path(event.name), event.value)
            return
        conversation = self.chat.conversation
        try:
            if event.name == PRESET:
                self._choose_preset(str(event.value))
                return
            value = float(event.value) if event.value is not None else 0.0
            if event.name == MAX_TOKENS:
                conversation.max_tokens = int(value) if value > 0 else -1
                return
            self._preset = ""
            self._apply_sampling(changed(conversation.sampling, event.name, value))
        except EdgetuneError as error:
            self.edgetune.say_error(error)
        finally:
            self._show_settings()
        self._look_ahead()

    def _choose_preset(self, name: str) -> None:
        if name != CUSTOM:
            self._apply_sampling(apply_preset(name, self.chat.conversation.sampling, model=self.chat.session.name))
        self._preset = "" if name == CUSTOM else name
        self._look_ahead()

    def _apply_sampling(self, sampling: Sampling) -> None:
        """From the next token on, also of a reply that runs."""
        self.chat.conversation.sampling = sampling
        if self.run_now is not None:
            for reply in self.run_now.replies:
                reply.change_sampling(sampling)

    @work(exclusive=False)
    async def _change_adapter(self, path: Path, value: float | str | None) -> None:
        session, conversation = self.chat.session, self.chat.conversation
        known = {spec.path: spec for spec in session.engine.adapters}
        if value is None:
            is_on = path in known and known[path].scale
            value = (
                0.0 if is_on else float(self.side.query_one("#adapters", ControlList).values.get(str(path), 1.0)) or 1.0
            )
        scale = float(value)
        if self.run_now is not None:
            self.edgetune.say("The adapter changes with the next reply.")

        def apply() -> None:
            session.set_adapter(path, scale)
            conversation.template = session.template or conversation.template

        try:
            await self.edgetune.engine_worker.run_latest(f"adapter {path}", apply)
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
        self._show_settings()
        await self._list_adapters()
        self._look_ahead()

    async def _list_adapters(self) -> None:
        session = self.chat.session
        fitting = await asyncio.to_thread(fitting_adapters, session.fingerprint)
        loaded = {spec.path.resolve(): spec for spec in session.engine.adapters}
        listed = [ListedAdapter(adapter_name(spec.path), spec.path, spec.scale) for spec in loaded.values()]
        listed += [ListedAdapter(adapter_name(path), path, 0.0) for path in fitting if path.resolve() not in loaded]
        self.side.show_adapters(sorted(listed, key=lambda one: one.name))

    async def on_side_panel_wished(self, event: SidePanel.Wished) -> None:
        """Keep, forget, add."""
        event.stop()
        self._side_wish(event.wish)

    @work(exclusive=False)
    async def _side_wish(self, wish: str) -> None:
        from edgetune.tui.dialogs import LineDialog

        model, sampling = self.chat.session.name, self.chat.conversation.sampling
        try:
            if wish == "delete_preset":
                delete_preset(self._preset, model=model)
                self.edgetune.say(f"Preset {self._preset} deleted.")
                self._preset = ""
            elif wish == "save_preset":
                name = await self.app.push_screen_wait(LineDialog(f"Name of the preset, for {model}"))
                if name:
                    save_preset(name, sampling, model=model)
                    self._preset = name
            elif wish == "add_adapter":
                value = await self.app.push_screen_wait(
                    LineDialog("Adapter: name, run or GGUF file", placeholder="FILE[:SCALE]")
                )
                if value:
                    spec: LoraSpec = await asyncio.to_thread(find_adapter, value)
                    self._change_adapter(spec.path, spec.scale)
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
        self._show_settings()

    # -- messages, tokens, branches

    def on_transcript_wished(self, event: Transcript.Wished) -> None:
        """A key on a message."""
        event.stop()
        node = event.node
        if event.wish == "copy":
            self.app.copy_to_clipboard(node.content)
            self.edgetune.say("Copied.")
        elif self.run_now is not None:
            self.edgetune.say("The reply is still being made.", hint="Esc stops it; what was said stays.")
        elif event.wish in ("previous", "next"):
            self._to_sibling(node, -1 if event.wish == "previous" else 1)
        elif event.wish == "retry":
            self.action_retry()
        elif event.wish == "edit":
            self._edit(node)
        elif event.wish in ("up", "down"):
            self._vote(node, event.wish)

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
        """Show what a token was chosen from."""
        event.stop()
        panel = self.query_one("#tokens")
        panel.set_class(event.node is not None, "open")
        if event.node is None:
            self._look_ahead()
            return
        self._alternative = 0
        self._show_token()

    def on_transcript_alternative_moved(self, event: Transcript.AlternativeMoved) -> None:
        """Another alternative."""
        event.stop()
        alternatives = self._alternatives()
        if alternatives:
            self._alternative = min(max(self._alternative + event.step, 0), len(alternatives) - 1)
            self._show_token()

    def on_candidate_bars_clicked(self, event: CandidateBars.Clicked) -> None:
        """A click chooses an alternative, another one branches."""
        event.stop()
        if self.transcript.token is None or event.index >= len(self._alternatives()):
            return
        if self._alternative == event.index:
            self._branch()
        self._alternative = event.index
        self._show_token()

    def on_transcript_alternative_taken(self, event: Transcript.AlternativeTaken) -> None:
        """Branch."""
        event.stop()
        self._branch()

    def _choice(self) -> Any:
        node, token = self.transcript.selected, self.transcript.token
        if node is None or token is None:
            return None
        choices = self.transcript.choices_of(node)
        return choices[token] if token < len(choices) else None

    def _alternatives(self) -> Any:
        choice = self._choice()
        return choice.alternatives if choice is not None else ()

    def _show_token(self) -> None:
        choice, node, token = self._choice(), self.transcript.selected, self.transcript.token
        if choice is None or node is None or token is None:
            return
        bars = self.query_one("#alternatives", CandidateBars)
        bars.empty = "This token was given, not chosen: nothing stood beside it."
        bars.show(choice.alternatives, chosen=choice.id, cursor=self._alternative if choice.alternatives else None)
        text = token_text(self.transcript.generated_of(node)[choice.start : choice.end])
        count = len(self.transcript.choices_of(node))
        self.query_one("#tokens-title", Static).update(
            f"{token + 1}/{count} {one_line(text, length=16)} {percent(choice.probability).strip()} → "
            f"{percent(choice.sampled).strip()}   ←→ token  ↑↓ other  Enter branches  Esc back"
        )

    def _branch(self) -> None:
        node, token, alternatives = self.transcript.selected, self.transcript.token, self._alternatives()
        if node is None or token is None or not alternatives:
            self.app.bell()
            return
        if self.run_now is not None:
            self.edgetune.say("The reply is still being made.", hint="Esc stops it; what was said stays.")
            return
        taken = alternatives[self._alternative]
        if taken.id == node.ids[token]:
            self.edgetune.say("That is the token that was taken.", hint="Choose another one with ↑ and ↓.")
            return
        conversation = self.chat.conversation
        self.answer(lambda: conversation.branch(node.id, token, taken.id), token=token)

    def _follow_token(self, run: ReplyRun, token: int) -> None:
        self.transcript.leave_tokens()
        self.transcript.scroll_end(animate=False)

    # -- actions

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

    def action_page(self, page: Page) -> None:
        """Open the panel on this page; close it when it is there already."""
        if self.side.has_class("open") and self.side.page == page:
            self._close_side()
            return
        self.side.add_class("open")
        self.query_one("#main").add_class("side")
        self.side.turn_to(page)
        self.side.current_list.focus()
        if page == "adapters":
            self.run_worker(self._list_adapters())
        self._look_ahead()

    def _close_side(self) -> None:
        self.side.remove_class("open")
        self.query_one("#main").remove_class("side")
        self.composer.entry.focus()

    def action_token_view(self) -> None:
        """Show replies by their tokens, or as they are meant."""
        self.transcript.leave_tokens()
        self.transcript.has_token_view = not self.transcript.has_token_view

    def action_to_messages(self) -> None:
        """Into the conversation."""
        self.transcript.focus()

    def action_retry(self) -> None:
        """Another reply to the last message."""
        self.answer(self.chat.conversation.retry)

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

        if self.run_now is not None:
            return

        def walk(node_id: str | None) -> None:
            if node_id:
                self.run_worker(self.go_to(self.chat.conversation.tree.node(node_id)))

        self.app.push_screen(BranchesScreen(self.chat.conversation.tree), walk)

    def action_compare(self) -> None:
        """Two settings side by side."""
        from edgetune.tui.compare import CompareScreen

        if self.run_now is not None:
            self.edgetune.say("The reply is still being made.", hint="Esc stops it; what was said stays.")
            return
        self.app.push_screen(CompareScreen(self.chat), lambda _: self._come_back())

    def action_sessions(self) -> None:
        """The chats that are kept."""
        from edgetune.tui.sessions import SessionsScreen

        if self.run_now is not None:
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

    # -- completion and the palette

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


def _stamp(path: Path) -> tuple[int, int, float] | None:
    """What tells a file from another one in its place."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime


def _preset_of(chat: OpenChat) -> str:
    """The preset that the conversation's sampling is; empty when it is nobody's."""
    sampling, model = chat.conversation.sampling, chat.session.name
    try:
        return next((name for name in load_presets(model) if apply_preset(name, sampling, model=model) == sampling), "")
    except EdgetuneError:
        return ""


def _demand(reply: Reply | None) -> Reply:
    assert reply is not None
    return reply
