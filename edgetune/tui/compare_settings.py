"""What the two sides of a comparison answer by: adapter, scale, preset and the sampling that tells most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from textual import work
from textual.screen import Screen
from textual.widgets import Static

from edgetune.chat.open_chat import OpenChat
from edgetune.chat.presets import apply_preset, load_presets
from edgetune.chat.session import Session, adapter_name
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError
from edgetune.gguf_header import read_gguf_header
from edgetune.template import ChatTemplate
from edgetune.tui.adapter_list import fitting_adapters
from edgetune.tui.controls import Control, ControlList
from edgetune.tui.ending import EndsWorkers
from edgetune.tui.sampling_controls import CUSTOM, NUMBERS, changed
from edgetune.tui.transcript import Transcript

if TYPE_CHECKING:
    from edgetune.tui.app import EdgetuneApp

_AS_NOW, _NONE = "as now", "none"
_ADAPTER, _SCALE, _PRESET = "adapter", "scale", "preset"
_SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty")


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


class CompareSettings(EndsWorkers, Screen[None]):
    """The controls above each side."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__()
        self.chat = chat
        now = chat.conversation.sampling
        self.settings = [SideSetting(now), SideSetting(now)]
        self._known: dict[str, Path] = {adapter_name(one.path): one.path for one in chat.session.engine.adapters}

    @property
    def edgetune(self) -> EdgetuneApp:
        """The app."""
        from edgetune.tui.app import EdgetuneApp

        assert isinstance(self.app, EdgetuneApp)
        return self.app

    def begin_settings(self) -> None:
        """Begin with what tells most: without an adapter against with it, or two temperatures."""
        if any(one.scale for one in self.chat.session.engine.adapters):
            self.settings[0].adapter = _NONE
        else:
            self.settings[0].sampling = replace(self.settings[0].sampling, temp=0.0)
        self._show_settings()
        self._find_adapters()

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

    def action_settings(self) -> None:
        """To A's settings, then to B's."""
        for reply in self.query(Transcript):
            reply.leave_tokens()
        self.remove_class("tokens")
        views: Sequence[ControlList] = list(self.query(ControlList))
        views[1 if views[0].has_focus else 0].focus()


def side_template(session: Session, adapters: Sequence[LoraSpec] | None) -> ChatTemplate | None:
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
