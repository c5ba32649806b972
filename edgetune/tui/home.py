"""The screen to begin with: models, adapters and runs on this machine, what each is, and what can be done with it.

Chatting opens the chat screen; every other stage runs as a child process, one at a time, its progress shown below.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import Screen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import EdgetuneError
from edgetune.events import Event, Metrics, Notice, Progress
from edgetune.library import Entry, checkpoint_architecture, describe, disk_bytes
from edgetune.paths import bytes_text
from edgetune.plot import braille_plot
from edgetune.tui.dialogs import AskDialog, LineDialog
from edgetune.tui.palette import Palette
from edgetune.tui.stages import (
    Stage,
    StageEnd,
    actions_for,
    is_unfinished,
    known_data,
    list_entries,
    quantize_arguments,
    train_arguments,
    verify_arguments,
)
from edgetune.tui.visible import one_line, visible

if TYPE_CHECKING:
    from edgetune.chat.open_chat import OpenChat, Outcome
    from edgetune.tui.app import EdgetuneApp

ChatOpening = Callable[[Path], "tuple[OpenChat, Outcome]"]
"""Opens a chat with the model, the adapter or the run at a path."""

_KINDS = {"checkpoint": "model", "run": "run", "model": "GGUF", "adapter": "adapter"}
_METRICS = "metrics.jsonl"
_CURVE_ROWS = 5
_NOTICES = 3
_OUTPUT_LINES = 8
_KEYS = {"chat": "c", "convert": "g", "quantize": "u", "verify": "v", "train": "t"}


class HomeScreen(Screen[None]):
    """What there is, and what to do with it."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (70, "-wide")]  # noqa: RUF012  (as Textual declares it)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "do('chat')", "Chat with it; an adapter and a run bring their base"),
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
        self._view, self._title = StageView(), ""

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
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._show_all())
        self.set_interval(0.1, self._show_stage)
        self.action_reload()

    def on_screen_resume(self) -> None:
        """Back from a chat there may be more than before."""
        if self._entries:
            self.action_reload()

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
        if entry is None or name not in [action.name for action in actions_for(entry)]:
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
        if action == "do" and self.chosen is not None:
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
        if name == "quantize":
            answer = await self.app.push_screen_wait(LineDialog("Quantize to which type?", value="Q4_K_M"))
            return quantize_arguments(entry, answer) if answer else []
        if entry.kind == "run" and is_unfinished(entry.path):
            return train_arguments(entry, "")
        question = LineDialog(
            "Train on which data? Flags may follow, as in: rows.jsonl --epochs 2",
            value=known_data(entry),
            placeholder="a file, or a directory with train, valid and test",
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
        self.action_reload(Path(said[-1]).resolve() if said else None)

    def _row(self, entry: Entry) -> RenderableType:
        palette = Palette.of(self.app)
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        row.add_column(no_wrap=True, justify="right")
        row.add_row(Text(one_line(entry.name), palette.ink("foreground")), Text(_KINDS[entry.kind], palette.muted))
        return row

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
        if not (self._view.has_changed or now) or not self._title:
            return
        box = self.query_one("#stage", Static)
        box.update(self._view.render(self._title, Palette.of(self.app), width=max(box.size.width - 2, 20)))
        if now:
            self._show_all()


class StageView:
    """What a stage has told so far, and how it looks."""

    def __init__(self) -> None:
        self.end: StageEnd | None = None
        """How it ended; None while it runs."""
        self.is_stopping = False
        self.has_changed = True
        self._progress: Progress | None = None
        self._losses: list[float] = []
        self._metrics: Metrics | None = None
        self._valid: list[float] = []
        self._notices: list[Notice] = []

    def take(self, event: Event) -> None:
        """Take note of an event."""
        self.has_changed = True
        if isinstance(event, Progress):
            self._progress = event
        elif isinstance(event, Notice):
            self._notices = [*self._notices[1 - _NOTICES :], event]
        elif event.split == "train":
            self._metrics = event
            self._losses.append(event.values["loss"])
        else:
            self._valid.append(event.values["loss"])

    def render(self, title: str, palette: Palette, *, width: int) -> RenderableType:
        """Title, bar, numbers, the loss so far, the latest words."""
        self.has_changed = False
        parts: list[RenderableType] = [self._head(title, palette)]
        if self.end is None and self._progress is not None:
            parts.append(self._bar(self._progress, palette, width))
        if self._metrics is not None:
            parts.append(self._numbers(self._metrics, palette))
        if len(self._losses) > 1:
            parts += curve(self._losses, palette, width=width, rows=3)
        for notice in self._notices if self.end is None or not self.end.error else []:
            style = palette.ink("warning") if notice.level == "warning" else palette.muted
            parts.append(Text(one_line(notice.text), style, no_wrap=True, overflow="ellipsis"))
        if self.end is not None:
            output = self.end.output.splitlines()[:_OUTPUT_LINES]
            parts += [Text(visible(line), no_wrap=True, overflow="ellipsis") for line in output]
        if self.end is not None and self.end.error:
            style = palette.ink("warning" if self.end.was_stopped else "error")
            parts.append(Text(visible(self.end.error), style))
            parts.append(Text(visible(self.end.hint), palette.muted))
        return Group(*parts)

    def _head(self, title: str, palette: Palette) -> Text:
        if self.end is None:
            mark, style = ("stopping", "warning") if self.is_stopping else ("running", "accent")
        elif self.end.was_stopped:
            mark, style = "stopped", "warning"
        else:
            mark, style = ("failed", "error") if self.end.code else ("done", "success")
        head = Text(f"{mark} ", palette.ink(style, bold=True), no_wrap=True, overflow="ellipsis")
        return head.append(one_line(title), palette.muted)

    @staticmethod
    def _bar(progress: Progress, palette: Palette, width: int) -> RenderableType:
        label = f" {progress.stage} {_count(progress)}"
        bar = ProgressBar(
            total=progress.total or None,
            completed=progress.done,
            width=max(width - len(label) - 1, 10),
            pulse=not progress.total,
            style=palette.faint,
            complete_style=palette.ink("accent"),
            finished_style=palette.ink("success"),
        )
        row = Table.grid()
        row.add_row(bar, Text(label, palette.muted))
        return row

    def _numbers(self, metrics: Metrics, palette: Palette) -> Text:
        values = metrics.values
        shown = [("step", f"{metrics.step}"), ("loss", f"{values['loss']:.4f}")]
        if self._valid:
            shown.append(
                ("valid", " → ".join(f"{loss:.4f}" for loss in dict.fromkeys((self._valid[0], self._valid[-1]))))
            )
        shown += [("lr", f"{values['lr']:.1e}")] if "lr" in values else []
        shown += [("tokens/s", f"{values['tokens_per_second']:,.0f}")] if "tokens_per_second" in values else []
        return _pairs(shown, palette)


def details(entry: Entry, *, palette: Palette, width: int) -> RenderableType:
    """What is to be known of `entry`; reads its headers and records, so not for the thread that draws."""
    head = Text(one_line(entry.name), palette.ink("primary", bold=True))
    try:
        rows, more = _about_run(entry, palette, width) if entry.kind == "run" else (_about_model(entry), [])
    except (EdgetuneError, OSError) as error:
        return Group(head, Text(visible(str(error)), palette.ink("error")))
    rows.append(("path", str(entry.path)))
    if not entry.embedded:
        rows.append(("changed", f"{datetime.fromtimestamp(entry.added):%Y-%m-%d %H:%M}"))
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(Text(name, palette.muted), Text(visible(value)))
    return Group(head, table, *more)


def _about_model(entry: Entry) -> list[tuple[str, str]]:
    # Describing a checkpoint in full would hash its weights, which takes a while the first time.
    if entry.kind == "checkpoint":
        kind = "comes with edgetune" if entry.embedded else "Hugging Face directory"
        return [
            ("kind", kind),
            ("architecture", checkpoint_architecture(entry.path)),
            ("size", bytes_text(disk_bytes(entry.path))),
        ]
    about = describe(entry.path)
    adapts = f"rank {about.rank}, {', '.join(about.targets)}" if about.rank else ""
    return [
        ("kind", "GGUF adapter" if entry.kind == "adapter" else "GGUF model"),
        ("architecture", about.architecture),
        ("type", about.file_type),
        ("parameters", f"{about.parameters:,}"),
        ("size", bytes_text(about.bytes)),
        ("context", f"{about.sizes.context:,} tokens" if about.sizes.context else ""),
        ("base", about.base_name),
        ("adapts", adapts),
        ("trained", about.trained),
    ]


def _about_run(entry: Entry, palette: Palette, width: int) -> tuple[list[tuple[str, str]], list[RenderableType]]:
    if not (entry.path / RUN_RECORD).is_file():
        return [("kind", "PEFT adapter, trained elsewhere")], []
    run = Run.load(entry.path)
    train, valid = read_losses(entry.path)
    metrics = run.metrics
    state = "finished" if run.finished else f"stopped or at work, at step {len(train)}"
    rows = [
        ("kind", f"run, {state}"),
        ("base", run.base_name),
        ("data", ", ".join(Path(str(path)).name for path in run.data.get("paths", []))),
        ("steps", f"{metrics['step']:,}" if "step" in metrics else ""),
        ("loss", f"{train[0]:.4f} → {train[-1]:.4f}" if train else ""),
        ("validation", f"{valid[0]:.4f} → {valid[-1]:.4f}" if len(valid) > 1 else ""),
        ("GGUF", ", ".join(sorted(path.name for path in entry.path.glob("*.gguf"))) or "not converted yet"),
    ]
    return rows, curve(train, palette, width=width, rows=_CURVE_ROWS) if len(train) > 1 else []


def read_losses(run_dir: Path) -> tuple[list[float], list[float]]:
    """The training and validation losses that a run has written so far; a cut last line is not one yet."""
    losses: dict[str, list[float]] = {"train": [], "valid": []}
    try:
        lines = (run_dir / _METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            values = json.loads(line)
            losses[values["split"]].append(float(values["loss"]))
        except (ValueError, KeyError, TypeError):
            continue
    return losses["train"], losses["valid"]


def curve(losses: list[float], palette: Palette, *, width: int, rows: int) -> list[RenderableType]:
    """The loss from left to right, its highest and its lowest value at the side."""
    lines: list[RenderableType] = []
    for at, line in enumerate(braille_plot(losses, columns=max(width - 8, 10), rows=rows)):
        value = max(losses) if at == 0 else min(losses) if at == rows - 1 else None
        label = "" if value is None else f"{value:.2f}"
        lines.append(Text(f"{label:>6} ", palette.muted).append(line, palette.ink("accent")))
    return lines


def _count(progress: Progress) -> str:
    if progress.unit == "bytes":
        return bytes_text(progress.total or progress.done)
    done = f"{progress.done:.0f}/{progress.total:.0f}" if progress.total else f"{progress.done:.0f}"
    return f"{done} {progress.unit}".strip()


def _pairs(shown: list[tuple[str, str]], palette: Palette) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, value in shown:
        text.append(f"{name} ", palette.muted).append(f"{value}   ")
    return text
