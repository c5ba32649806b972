"""A and B: one message answered under two settings side by side, streamed together, by the same seed.

The verdict stays in the conversation's tree as votes, and can be added to a file of preference pairs or training rows.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import DescendantFocus
from textual.screen import Screen
from textual.widgets import Static

from edgetune.chat.conversation import Setting
from edgetune.chat.open_chat import OpenChat
from edgetune.chat.presets import apply_preset, load_presets
from edgetune.chat.reply import Reply
from edgetune.chat.session import Session, adapter_name
from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import RANDOM_SEED, Sampling
from edgetune.errors import EdgetuneError
from edgetune.gguf_header import read_gguf_header
from edgetune.paths import home_dir
from edgetune.template import ChatTemplate
from edgetune.tui.adapter_list import fitting_adapters
from edgetune.tui.composer import Composer, Entry
from edgetune.tui.controls import Control, ControlList
from edgetune.tui.dialogs import LineDialog, TextDialog
from edgetune.tui.history import History
from edgetune.tui.keys import KeyRows, key_rows
from edgetune.tui.reply_run import FASTEST, Pacer, ReplyRun
from edgetune.tui.sampling_controls import CUSTOM, NUMBERS, changed
from edgetune.tui.status import StatusLine
from edgetune.tui.training_rows import RowKind, append_rows, verdict_rows
from edgetune.tui.transcript import Transcript

if TYPE_CHECKING:
    from edgetune.tui.app import EdgetuneApp

_AS_NOW, _NONE = "as now", "none"
_ADAPTER, _SCALE, _PRESET = "adapter", "scale", "preset"
_SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty")
_WELCOME = "F2 goes to the settings above. Ask below; then a or b says which is better."
_SEEDS = 2**31


@dataclass
class SideSetting:
    """What one side answers by."""

    sampling: Sampling
    adapter: str = _AS_NOW
    scale: float = 1.0
    preset: str = _AS_NOW

    def adapters(self, known: dict[str, Path]) -> tuple[LoraSpec, ...] | None:
        """Its own adapters; None for those of the chat."""
        if self.adapter == _AS_NOW:
            return None
        return () if self.adapter == _NONE else (LoraSpec(known[self.adapter], self.scale),)


class CompareScreen(Screen[None]):
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
        Binding("e", "edit", "Write a better answer, from the one in focus"),
        Binding("s", "save('pairs')", "Add the verdict to a file of preference pairs"),
        Binding("S", "save('rows')", "Add the better answer to a file of training rows"),
        Binding("i", "to_input", "To the input"),
        Binding("question_mark", "app.show_keys", "Keys", show=False),
    ]

    def __init__(self, chat: OpenChat) -> None:
        super().__init__()
        self.chat = chat
        now = chat.conversation.sampling
        self.settings = [SideSetting(now), SideSetting(now)]
        self.run_now: ReplyRun | None = None
        self.nodes: list[Node] = []
        """The replies that were made, edited ones after them."""
        self._known: dict[str, Path] = {adapter_name(one.path): one.path for one in chat.session.engine.adapters}
        self._pacer = Pacer()
        self._focused_side = 0

    def compose(self) -> ComposeResult:
        """Settings over the replies, twice."""
        with Horizontal(id="sides"):
            for number, name in enumerate("AB"):
                with Vertical(classes="compare-side"):
                    yield Static(name, classes="compare-title", id=f"title-{number}", markup=False)
                    yield ControlList(label_width=11, id=f"settings-{number}")
                    yield Transcript(model_name=name, welcome=_WELCOME, id=f"reply-{number}")
        yield Composer(
            completer=lambda text: (),
            history=History(home_dir() / "history"),
            placeholder="One message for both; empty asks the last one again",
            id="composer",
        )
        yield StatusLine(id="status")

    def on_mount(self) -> None:
        """Begin with what tells most: without an adapter against with it, or two temperatures."""
        self._frames = self.set_interval(FASTEST, self._frame, pause=True)
        if any(one.scale for one in self.chat.session.engine.adapters):
            self.settings[0].adapter = _NONE
        else:
            self.settings[0].sampling = replace(self.settings[0].sampling, temp=0.0)
        self._show_settings()
        self.query_one(StatusLine).change(model=self.chat.session.name)
        self.query_one(Entry).focus()
        self._find_adapters()

    @property
    def edgetune(self) -> EdgetuneApp:
        """The app."""
        from edgetune.tui.app import EdgetuneApp

        assert isinstance(self.app, EdgetuneApp)
        return self.app

    def key_help(self) -> list[tuple[str, KeyRows]]:
        """What the keys do here."""
        return [("Two settings", key_rows(self.BINDINGS)), ("On the settings", key_rows(ControlList.BINDINGS))]

    # -- settings

    @work(thread=True)
    def _find_adapters(self) -> None:
        for path in fitting_adapters(self.chat.session.fingerprint):
            self._known.setdefault(adapter_name(path), path)
        self.app.call_from_thread(self._show_settings)

    def _show_settings(self) -> None:
        presets = list(load_presets(self.chat.session.name))
        shared = {control.name: control for control in NUMBERS}
        for number, setting in enumerate(self.settings):
            controls = [
                Control(_ADAPTER, "adapter", choices=(_AS_NOW, _NONE, *sorted(self._known))),
                Control(_SCALE, "scale", "", -2.0, 2.0, 0.05, default=1.0, zero=0.0),
                Control(_PRESET, "preset", choices=(_AS_NOW, *presets, CUSTOM)),
                *(shared[name] for name in _SAMPLING),
            ]
            view = self.query_one(f"#settings-{number}", ControlList)
            if view.controls != controls:
                view.set_controls(controls)
            values = {name: float(getattr(setting.sampling, name)) for name in _SAMPLING}
            view.show({**values, _ADAPTER: setting.adapter, _SCALE: setting.scale, _PRESET: setting.preset})
            self.query_one(f"#title-{number}", Static).update(f"{'AB'[number]}  {self._describe(setting)}")

    def _describe(self, setting: SideSetting) -> str:
        adapter = {_AS_NOW: "adapters as now", _NONE: "no adapter"}.get(
            setting.adapter, f"{setting.adapter} {setting.scale:g}"
        )
        return f"{adapter} · temp {setting.sampling.temp:g}"

    def on_control_list_changed(self, event: ControlList.Changed) -> None:
        """One side's setting."""
        event.stop()
        setting = self.settings[int(str(event.source.id)[-1])]
        try:
            if event.name == _ADAPTER:
                setting.adapter = str(event.value)
            elif event.name == _SCALE:
                setting.scale = float(event.value or 0)
            elif event.name == _PRESET:
                setting.preset = str(event.value)
                now = self.chat.conversation.sampling
                if setting.preset == _AS_NOW:
                    setting.sampling = now
                elif setting.preset != CUSTOM:
                    setting.sampling = apply_preset(setting.preset, now, model=self.chat.session.name)
            else:
                setting.sampling = changed(setting.sampling, event.name, float(event.value or 0))
                setting.preset = CUSTOM
        except EdgetuneError as error:
            self.edgetune.say_error(error)
        self._show_settings()

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
                    template=_template(chat.session, adapters),
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

    @property
    def _views(self) -> list[Transcript]:
        return [self.query_one(f"#reply-{number}", Transcript) for number in (0, 1)]

    def _frame(self) -> None:
        if self.run_now is not None and self.run_now.replies and self._pacer.is_due():
            self.run_now.look()
            for view in self._views:
                view.grow()
            self._show_speed(self.run_now)

    def _show_speed(self, run: ReplyRun) -> None:
        counts = [len(reply.generation.ids) for reply in run.replies]
        speeds = [reply.timings.tokens_per_second for reply in run.replies]
        self.query_one(StatusLine).change(adapters=f"A {counts[0]} · B {counts[1]} tokens", speed=sum(speeds))

    def _show_nodes(self) -> None:
        for view, node in zip(self._views, self._in_view(), strict=False):
            alone = replace(node, parent=None)
            view.show(Tree([alone], head=alone.id))

    def _in_view(self) -> list[Node]:
        """The reply on each side: the one edited last, where there is one."""
        shown = self.nodes[:2]
        for node in self.nodes[2:]:
            shown = [node if node.meta.get("edited_from") == one.id else one for one in shown]
        return shown

    # -- the verdict

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        """Which side `e` is about."""
        if (name := str(event.widget.id)).startswith(("reply-", "settings-")):
            self._focused_side = int(name[-1])

    def on_transcript_wished(self, event: Transcript.Wished) -> None:
        """The keys on a message that mean something here: edit, vote."""
        event.stop()
        if event.wish == "edit":
            self.action_edit()
        elif event.wish in ("up", "down"):
            self.action_prefer(self._focused_side if event.wish == "up" else 1 - self._focused_side)
        elif event.wish == "copy":
            self.app.copy_to_clipboard(event.node.content)

    @work
    async def action_prefer(self, side: int) -> None:
        """Vote one up and the other down, and go on with the better one."""
        nodes = self._in_view()
        if self.run_now is not None or len(nodes) < 2:
            return
        conversation = self.chat.conversation

        def vote() -> None:
            conversation.vote(nodes[side].id, "up")
            conversation.vote(nodes[1 - side].id, "down")
            conversation.select(nodes[side].id)

        await self.edgetune.engine_worker.run(vote)
        self._show_nodes()
        self.edgetune.say(f"{'AB'[side]} is better.", hint="s adds the pair to a file, S the better answer alone.")

    @work
    async def action_edit(self) -> None:
        """A better answer, written by hand."""
        nodes = self._in_view()
        if self.run_now is not None or not nodes:
            return
        node = nodes[min(self._focused_side, len(nodes) - 1)]
        text = await self.app.push_screen_wait(
            TextDialog("A better answer", node.content, note="It is preferred to the one it came from.")
        )
        if text is None or not text.strip() or text == node.content:
            return
        conversation = self.chat.conversation
        await self.edgetune.engine_worker.run(lambda: conversation.edit(node.id, text))
        edited = conversation.tree.path()[-1]
        # The views look for what came from the first two.
        if node in self.nodes[:2]:
            self.nodes.append(edited)
        else:
            self.nodes[self.nodes.index(node)] = edited
        self._show_nodes()

    @work
    async def action_save(self, kind: RowKind) -> None:
        """Add what was decided to a file."""
        rows = verdict_rows(self.chat.conversation.tree, self.nodes, kind=kind, system=self.chat.conversation.system)
        if not rows:
            self.edgetune.say("Nothing is decided yet.", hint="a or b says which is better, e writes a better one.")
            return
        name = await self.app.push_screen_wait(LineDialog(f"Add {len(rows)} {kind} to", value=f"{kind}.jsonl"))
        if not name:
            return
        path = Path(name).expanduser()
        try:
            count = append_rows(path, rows)
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
            return
        note = f" Train on it: edgetune train -d {path}" if kind == "rows" else ""
        self.edgetune.say(f"{count} added to {path}.{note}")

    # -- other keys

    def action_back(self) -> None:
        """Stop; else leave."""
        if self.run_now is not None:
            self.run_now.cancel()
        else:
            self.dismiss(None)

    def action_token_view(self) -> None:
        """Shade the tokens."""
        for view in self._views:
            view.has_token_view = not view.has_token_view

    def action_settings(self) -> None:
        """To A's settings, then to B's."""
        views: Sequence[ControlList] = list(self.query(ControlList))
        views[1 if views[0].has_focus else 0].focus()

    def action_to_input(self) -> None:
        """To the input."""
        self.query_one(Entry).focus()

    def action_stop_or_leave(self) -> None:
        """Ctrl-C in the input."""
        self.action_back()

    def action_leave(self) -> None:
        """Ctrl-D in the input."""
        self.action_back()


def _template(session: Session, adapters: Sequence[LoraSpec] | None) -> ChatTemplate | None:
    """The template that a side's adapters were trained with, as `Session.template` has it for those of the engine."""
    if adapters is None:
        return None
    sources = {
        str(source)
        for adapter in adapters
        if adapter.scale and (source := read_gguf_header(adapter.path).metadata.get("tokenizer.chat_template"))
    }
    if len(sources) == 1:
        return session.engine.tokenizer.build_template(sources.pop())
    return session.engine.tokenizer.chat_template
