"""The chats that are kept: found by their words, resumed, renamed, deleted, exported."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from edgetune.chat.database import ChatDatabase, SavedSession
from edgetune.chat.exports import ExportKind, export
from edgetune.chat.open_chat import OpenChat
from edgetune.errors import EdgetuneError
from edgetune.tui.dialogs import AskDialog, LineDialog, SafeInput
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.palette import Palette
from edgetune.tui.visible import one_line

_KINDS: dict[str, ExportKind] = {".md": "markdown", ".jsonl": "jsonl", ".json": "jsonl"}


class SearchInput(SafeInput):
    """Where one types; two of an input's own keys are the list's here."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+e", "screen.export", show=False),
        Binding("ctrl+x", "screen.remove", show=False),
    ]


class SessionsScreen(EndsWorkers, ModalScreen["str | None"]):
    """Returns the id of the chat to resume."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("up", "move('cursor_up')", "The chat above, below"),
        Binding("down", "move('cursor_down')", "The chat above, below"),
        Binding("pageup", "move('page_up')", "A page up, down"),
        Binding("pagedown", "move('page_down')", "A page up, down"),
        Binding("enter", "resume", "Resume"),
        Binding("ctrl+r", "rename", "Rename"),
        Binding("ctrl+e", "export", "Export"),
        Binding("ctrl+x", "remove", "Delete"),
    ]

    def __init__(self, chat: OpenChat, database: ChatDatabase) -> None:
        super().__init__()
        self._chat, self._database = chat, database
        self._shown: list[SavedSession] = []

    def compose(self) -> ComposeResult:
        """The search over the list."""
        with Vertical(classes="dialog text-dialog") as box:
            box.border_title = "Chats"
            box.border_subtitle = "Enter resumes, ^R renames, ^E exports, ^X deletes, Esc closes"
            yield SearchInput(placeholder="Search in everything said", compact=True)
            options = OptionList(markup=False, compact=True)
            # Whatever is typed is searched for; the keys for the list hold without going there.
            options.can_focus = False
            yield options

    def on_mount(self) -> None:
        """Everything, newest first."""
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._fill())
        self._fill()

    def on_input_changed(self) -> None:
        """Search while one types; the best find is the newest one."""
        self._fill(at=0)

    def on_input_submitted(self) -> None:
        """Enter."""
        self.action_resume()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """By mouse."""
        self.action_resume()

    def action_resume(self) -> None:
        """Go on with the chat under the cursor."""
        if (saved := self._current()) is not None:
            self.dismiss(saved.id)

    async def action_move(self, step: str) -> None:
        """Another chat."""
        await self.query_one(OptionList).run_action(step)

    @work
    async def action_rename(self) -> None:
        """Another title."""
        if (saved := self._current()) is not None:
            title = await self.app.push_screen_wait(LineDialog("Title", value=saved.title))
            if title:
                self._try(lambda: self._database.rename(saved.id, title))

    @work
    async def action_remove(self) -> None:
        """Delete it, with its KV state."""
        saved = self._current()
        if saved is None:
            return
        if self._chat.autosave is not None and saved.id == self._chat.autosave.session_id:
            self.app.say("This is the chat you are in.", hint="^N begins another one.")  # type: ignore[attr-defined]
        elif await self.app.push_screen_wait(AskDialog(f"Delete “{saved.title or saved.id[:8]}” for good?")):
            self._try(lambda: self._database.delete(saved.id))

    @work
    async def action_export(self) -> None:
        """Write it to a file: .md is for people, .jsonl for training."""
        saved = self._current()
        if saved is None:
            return
        name = await self.app.push_screen_wait(LineDialog("File: .md to read, .jsonl to train on", value="chat.md"))
        if name:
            path = Path(name).expanduser()
            kind = _KINDS.get(path.suffix, "markdown")

            def write() -> None:
                tree = self._database.load(saved.id)
                count = export(path, tree, kind=kind, title=saved.title, system=saved.system)
                what = "messages" if kind == "markdown" else "rows"
                self.app.say(f"{count} {what} in {path}")  # type: ignore[attr-defined]

            self._try(write)

    def _try(self, act: object) -> None:
        try:
            act()  # type: ignore[operator]
        except (EdgetuneError, OSError) as error:
            self.app.say_error(error)  # type: ignore[attr-defined]
        self._fill()

    def _current(self) -> SavedSession | None:
        at = self.query_one(OptionList).highlighted
        return self._shown[at] if at is not None and at < len(self._shown) else None

    def _fill(self, *, at: int | None = None) -> None:
        options, words = self.query_one(OptionList), self.query_one(Input).value
        at = options.highlighted or 0 if at is None else at
        excerpts: dict[str, str] = {}
        try:
            if words.strip():
                found = self._database.search(words)
                for one in found:
                    excerpts.setdefault(one.session.id, one.excerpt)
                self._shown = list({one.session.id: one.session for one in found}.values())
            else:
                self._shown = self._database.sessions()
        except EdgetuneError as error:
            self.app.say_error(error)  # type: ignore[attr-defined]
            self._shown = []
        options.clear_options()
        palette = Palette.of(self.app)
        options.add_options([Option(self._row(saved, excerpts.get(saved.id, ""), palette)) for saved in self._shown])
        if not self._shown:
            options.add_option(
                Option("Nothing was found." if words.strip() else "No chats are kept yet.", disabled=True)
            )
        options.highlighted = min(at, len(self._shown) - 1) if self._shown else None

    def _row(self, saved: SavedSession, excerpt: str, palette: Palette) -> Text:
        when = datetime.fromisoformat(saved.updated).astimezone().strftime("%d %b %H:%M")
        is_here = self._chat.autosave is not None and saved.id == self._chat.autosave.session_id
        text = Text("● " if is_here else "  ", palette.ink("accent"), no_wrap=True, overflow="ellipsis")
        text.append(one_line(saved.title, length=44) or saved.id[:8], palette.ink("foreground", bold=True))
        count = f"{saved.messages} message{'' if saved.messages == 1 else 's'}"
        text.append(f"  {when} · {count} · {one_line(Path(saved.model).stem, length=20)}", palette.muted)
        if excerpt:
            text.append(f"\n    {one_line(excerpt)}", palette.muted)
        return text
