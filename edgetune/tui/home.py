"""The screen to begin with: models, adapters and runs on this machine, what each is, and what can be done with it.

Chatting opens the chat screen; every other stage runs as a child process, one at a time, its progress shown below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgetune.errors import EdgetuneError
from edgetune.library import Entry
from edgetune.tui.details import details
from edgetune.tui.dialogs import AskDialog, LineDialog
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.palette import Palette
from edgetune.tui.stage_view import StageView
from edgetune.tui.stages import (
    Stage,
    actions_for,
    is_unfinished,
    known_data,
    list_entries,
    purpose,
    quantize_arguments,
    train_arguments,
    use_arguments,
    verify_arguments,
)
from edgetune.tui.visible import one_line

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome
    from edgetune.tui.app import EdgetuneApp

ChatOpening = Callable[[Path], "tuple[OpenChat, Outcome]"]
"""Opens a chat with the model, the adapter or the run at a path."""

_KINDS = {"checkpoint": "model", "run": "run", "model": "GGUF", "adapter": "adapter"}
_KEYS = {
    "chat": "c", "classify": "l", "embed": "e", "generate": "w",
    "convert": "g", "quantize": "u", "verify": "v", "train": "t",
}  # fmt: skip
_ASKS = {
    "classify": "Classify which text, or the rows of which file?",
    "embed": "Embed which text, or the lines of which file?",
    "generate": "Which text is the source?",
}


class HomeScreen(EndsWorkers, Screen[None]):
    """What there is, and what to do with it."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (70, "-wide")]  # noqa: RUF012  (as Textual declares it)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "do('chat')", "Chat with it; an adapter and a run bring their base"),
        Binding("l", "do('classify')", "Labels or a value for a text, from a model made for it"),
        Binding("e", "do('embed')", "The vector of a text, from a model made for it"),
        Binding("w", "do('generate')", "What an encoder-decoder writes for a text"),
        Binding("g", "do('convert')", "Convert it to GGUF, and prove it"),
        Binding("u", "do('quantize')", "Quantize it"),
        Binding("v", "do('verify')", "Prove that the GGUF is what was trained"),
        Binding("t", "do('train')", "Train an adapter on data; go on with a run that was stopped"),
        Binding("x", "stop", "Stop what is running"),
        Binding("r", "reload", "Look again what there is"),
        Binding("question_mark", "app.show_keys", "This list"),
        Binding("q", "leave", "Leave"),
        Binding("ctrl+c", "stop_or_leave", "Stop what is running; leave", show=False),
    ]
    DEFAULT_CSS = """
    HomeScreen {
        layout: vertical;

        #title { height: 1; background: $panel; color: $primary; text-style: bold; padding: 0 1; }
        #there { height: 1fr; }
        #entries { width: 36; height: 1fr; border: none; padding: 0; background: $surface; }
        #details { width: 1fr; height: 1fr; padding: 0 1; }
        #stage { height: auto; max-height: 50%; border-top: tall $panel; padding: 0 1; display: none; }
        #stage.open { display: block; }
        #offers { height: 1; background: $panel; padding: 0 1; }

        &.-narrow #there { layout: vertical; }
        &.-narrow #entries { width: 1fr; }
    }
    """

    def __init__(self, open_chat: ChatOpening) -> None:
        super().__init__()
        self._open_chat = open_chat
        self._entries: list[Entry] = []
        self._stage: Stage | None = None
        self._view, self._title, self._stage_width = StageView(), "", 0

    def compose(self) -> ComposeResult:
        """List and details side by side, what runs below them, what can be done at the bottom."""
        yield Static("edgetune", id="title")
        with Horizontal(id="there"):
            yield OptionList(id="entries", compact=True)
            with VerticalScroll(id="details", can_focus=False):
                yield Static("", id="about", markup=False)
        yield Static("", id="stage", markup=False)
        yield Static("", id="offers", markup=False)

    def on_mount(self) -> None:
        """Look what there is."""
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._retheme())
        self.set_interval(0.1, self._show_stage)
        self.action_reload()

    def on_screen_resume(self) -> None:
        """Back from a chat there may be more than before."""
        if self._entries:
            self.action_reload()

    def on_resize(self) -> None:
        """What is drawn to a width is drawn anew."""
        self.call_after_refresh(self._show_all)

    @property
    def chosen(self) -> Entry | None:
        """The entry the keys act on."""
        at = self.query_one("#entries", OptionList).highlighted
        return self._entries[at] if at is not None and at < len(self._entries) else None

    @property
    def is_busy(self) -> bool:
        """Whether a stage runs."""
        return self._stage is not None

    @work(exclusive=True, group="entries")
    async def action_reload(self, wanted: Path | None = None) -> None:
        """Read the library again and stay on the same entry, or go to `wanted`."""
        before = self.chosen
        self._entries = await asyncio.to_thread(list_entries)
        entries = self.query_one("#entries", OptionList)
        entries.clear_options()
        entries.add_options([Option(self._row(entry)) for entry in self._entries])
        paths = [entry.path for entry in self._entries]
        found = [paths.index(path) for path in (wanted, before and before.path) if path in paths]
        entries.highlighted = next(iter(found), 0) if paths else None
        entries.focus()
        self._show_all()

    def on_option_list_option_highlighted(self) -> None:
        """Another entry."""
        self._show_all()

    def on_option_list_option_selected(self) -> None:
        """Enter: the first thing that can be done."""
        if self.chosen is not None:
            self.action_do(actions_for(self.chosen)[0].name)

    @work(group="actions")
    async def action_do(self, name: str) -> None:
        """Do what the key says with the chosen entry."""
        entry = self.chosen
        if entry is None:
            return
        if name not in (offered := {action.name: action for action in actions_for(entry)}):
            use = offered.get(purpose(entry))
            if name == "chat" and use is not None:
                key = _KEYS[use.name]
                self._edgetune.say(f"{one_line(entry.name)} does not chat.", hint=f"Press {key}: {use.title}.")
            return
        if name == "chat":
            title = one_line(entry.name)
            self._edgetune.push_screen(self._edgetune.chat_screen(lambda: self._open_chat(entry.path), title=title))
            return
        if self.is_busy:
            self._edgetune.say("Something is running already.", hint="Wait for it, or stop it with x.")
            return
        try:
            arguments = await self._arguments(name, entry)
        except (EdgetuneError, OSError) as error:
            self._edgetune.say_error(error)
            return
        if arguments and not self.is_busy:
            self._run_stage(arguments)

    def action_stop(self) -> None:
        """Stop the stage."""
        if self._stage is not None:
            self._view.is_stopping = True
            self._stage.stop()

    def action_stop_or_leave(self) -> None:
        """Ctrl-C."""
        if self.is_busy:
            self.action_stop()
        else:
            self.app.exit()

    @work(group="actions")
    async def action_leave(self) -> None:
        """Leave; what runs is not lost without a question."""
        if not self.is_busy or await self.app.push_screen_wait(AskDialog("Stop what is running, and leave?")):
            self.app.exit()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A key for what cannot be done does nothing."""
        if action == "do" and self.chosen is not None and parameters[0] != "chat":
            return parameters[0] in [offer.name for offer in actions_for(self.chosen)]
        return self.is_busy if action == "stop" else True

    @property
    def _edgetune(self) -> EdgetuneApp:
        app: EdgetuneApp = self.app  # type: ignore[assignment]
        return app

    async def _arguments(self, name: str, entry: Entry) -> list[str]:
        """The command line of a stage; empty when the question about it was given up."""
        if name == "convert":
            return ["convert", str(entry.path)]
        if name == "verify":
            return await asyncio.to_thread(verify_arguments, entry)
        if name in _ASKS:
            placeholder = "a text, or a file and flags, as in: rows.csv -o out.npy" if name == "embed" else ""
            answer = await self.app.push_screen_wait(LineDialog(_ASKS[name], placeholder=placeholder))
            return use_arguments(name, entry, answer) if answer else []
        if name == "quantize":
            answer = await self.app.push_screen_wait(LineDialog("Quantize to which type?", value="Q4_K_M"))
            return quantize_arguments(entry, answer) if answer else []
        if entry.kind == "run" and is_unfinished(entry.path):
            return train_arguments(entry, "")
        question = LineDialog(
            "Train on which data? Flags may follow, as in: rows.jsonl --epochs 2",
            value=known_data(entry),
            placeholder="a file, or a directory with train, valid and test",
            goes_on=True,
        )
        answer = await self.app.push_screen_wait(question)
        return train_arguments(entry, answer) if answer else []

    @work(group="stage")
    async def _run_stage(self, arguments: list[str]) -> None:
        self._stage, self._view = Stage(arguments), StageView()
        self._title = self._stage.title
        self.query_one("#stage").add_class("open")
        self._show_stage(now=True)
        try:
            self._view.end = await self._stage.run(self._view.take)
        finally:
            self._stage = None
        self._show_stage(now=True)
        said = self._view.end.output.splitlines()
        makes_file = arguments[0] not in _ASKS
        self.action_reload(Path(said[-1]).resolve() if said and makes_file else None)

    def _row(self, entry: Entry) -> RenderableType:
        palette = Palette.of(self.app)
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        row.add_column(no_wrap=True, justify="right")
        row.add_row(Text(one_line(entry.name), palette.ink("foreground")), Text(_KINDS[entry.kind], palette.muted))
        return row

    def _retheme(self) -> None:
        entries = self.query_one("#entries", OptionList)
        for index, entry in enumerate(self._entries):
            entries.replace_option_prompt_at_index(index, self._row(entry))
        self._show_stage(now=True)
        self._show_all()

    def _show_all(self) -> None:
        entry = self.chosen
        palette = Palette.of(self.app)
        offers = Text(no_wrap=True, overflow="ellipsis")
        named = [(_KEYS[action.name], action.title) for action in (actions_for(entry) if entry else ())]
        named += [("x", "Stop")] if self.is_busy else []
        for key, title in (*named, ("?", "Keys"), ("q", "Leave")):
            offers.append(f"{key} ", palette.ink("accent", bold=True)).append(f"{title}  ")
        self.query_one("#offers", Static).update(offers)
        if entry is not None:
            self._show_details(entry)

    @work(exclusive=True, group="details")
    async def _show_details(self, entry: Entry) -> None:
        width = max(self.query_one("#details").size.width - 3, 20)
        about = await asyncio.to_thread(details, entry, palette=Palette.of(self.app), width=width)
        self.query_one("#about", Static).update(about)

    def _show_stage(self, *, now: bool = False) -> None:
        box = self.query_one("#stage", Static)
        # The box has no width before it is first laid out, and another one in a terminal of another size.
        before, self._stage_width = self._stage_width, max(box.size.width - 2, 20)
        if not (self._view.has_changed or now or self._stage_width != before) or not self._title:
            return
        box.update(self._view.render(self._title, Palette.of(self.app), width=self._stage_width))
        if now:
            self._show_all()
