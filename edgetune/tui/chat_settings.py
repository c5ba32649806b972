"""The chat screen's panel: sampling, presets and adapters, in force from the next token on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from textual import work

from edgetune.chat.adapters import find_adapter
from edgetune.chat.open_chat import OpenChat
from edgetune.chat.presets import apply_preset, delete_preset, load_presets, save_preset
from edgetune.chat.session import adapter_name
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError
from edgetune.tui.adapter_list import fitting_adapters
from edgetune.tui.chat_outlook import ChatOutlook
from edgetune.tui.controls import ControlList
from edgetune.tui.sampling_controls import CUSTOM, MAX_TOKENS, PRESET, changed
from edgetune.tui.side_panel import ListedAdapter, Page, SidePanel


class ChatSettings(ChatOutlook):
    """Does what the panel asks for, and shows there what holds."""

    def __init__(self, chat: OpenChat) -> None:
        super().__init__(chat)
        self._preset = _preset_of(chat)
        self._adapters_heard = self._adapters_pending = 0

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

    def on_control_list_changed(self, event: ControlList.Changed) -> None:
        """A slider, a choice or a switch."""
        event.stop()
        if event.source.id == "adapters":
            self._adapters_heard += 1
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

    def _change_adapter(self, path: Path, value: float | str | None) -> None:
        self._adapters_pending += 1
        self._set_adapter(path, value)

    @work(exclusive=False)
    async def _set_adapter(self, path: Path, value: float | str | None) -> None:
        session = self.chat.session
        known = {spec.path: spec for spec in session.engine.adapters}
        if value is None:
            is_on = path in known and known[path].scale
            value = (
                0.0 if is_on else float(self.side.query_one("#adapters", ControlList).values.get(str(path), 1.0)) or 1.0
            )
        scale = float(value)
        try:
            is_later = await self.edgetune.engine_worker.run_between(lambda: self._apply_adapter(path, scale))
        except (EdgetuneError, OSError) as error:
            self.edgetune.say_error(error)
        else:
            if is_later:
                self.edgetune.say("The adapter has a chat template of its own: it changes with the next reply.")
        finally:
            self._adapters_pending -= 1
        self._show_settings()
        await self._list_adapters()
        self._look_ahead()

    def _apply_adapter(self, path: Path, scale: float) -> bool:
        """Set it for what comes, and for the reply that runs; whether that one has to go on as it is.

        For the engine's thread, between two tokens.
        """
        session, conversation, run = self.chat.session, self.chat.conversation, self.run_now
        session.set_adapter(path, scale)
        template = session.template or conversation.template
        running = [reply for reply in run.replies if reply.finish_reason is None] if run is not None else []
        if running and template.source != conversation.template.source:
            # What was asked was written by the old template, and what is being said is read by it.
            self.edgetune.engine_worker.submit(lambda: setattr(conversation, "template", template))
            return True
        conversation.template = template
        for reply in running:
            reply.change_adapters()
        return False

    async def _list_adapters(self) -> None:
        """Show them; but a slider that is moved meanwhile stays where it was moved to, and is shown then."""
        session = self.chat.session
        fitting = await asyncio.to_thread(fitting_adapters, session.fingerprint)
        if self._adapters_pending or self.side.query_one("#adapters", ControlList).told != self._adapters_heard:
            return
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


def _preset_of(chat: OpenChat) -> str:
    """The preset that the conversation's sampling is; empty when it is nobody's."""
    sampling, model = chat.conversation.sampling, chat.session.name
    try:
        return next((name for name in load_presets(model) if apply_preset(name, sampling, model=model) == sampling), "")
    except EdgetuneError:
        return ""
