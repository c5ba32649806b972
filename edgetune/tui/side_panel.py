"""The panel beside the conversation: the next token's distribution over the controls of sampling or of the adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Static

from edgetune.engine.protocol import Candidate
from edgetune.engine.sampling import Sampling
from edgetune.tui.bars import CandidateBars
from edgetune.tui.controls import Control, ControlList
from edgetune.tui.sampling_controls import CUSTOM, NUMBERS, PRESET, preset_control, values_of

Page = Literal["sampling", "adapters"]
_PLOT_ROWS = 10


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter that fits the model."""

    name: str
    path: Path
    scale: float
    """The one in force; 0 when it is off."""


class SidePanel(Vertical):
    """Shows one of two pages; what is changed on them comes out as the lists' own messages."""

    DEFAULT_CSS = """
    SidePanel {
        width: 40;
        border-left: tall $panel;
        background: $surface;
        padding: 0 0 0 1;
        #side-title { color: $accent; text-style: bold; height: 1; }
        #side-hint { color: $text-muted; height: 2; }
        CandidateBars { background: $surface; }
        ControlList { height: 1fr; background: $surface; scrollbar-size-vertical: 1; }
        .hidden { display: none; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "save_preset", "Keep these values as a preset", show=False),
        Binding("X", "delete_preset", "Delete the preset, if it is yours", show=False),
        Binding("a", "add_adapter", "Add an adapter by name or path", show=False),
    ]

    class Wished(Message):
        """A key asks the screen for something."""

        def __init__(self, wish: Literal["save_preset", "delete_preset", "add_adapter"]) -> None:
            super().__init__()
            self.wish = wish

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.page: Page = "sampling"

    def compose(self) -> ComposeResult:
        """Title, plot, the two lists, a line about the control under the cursor."""
        yield Static("", id="side-title", markup=False)
        plot = CandidateBars(rows=_PLOT_ROWS, id="plot")
        plot.empty = "No distribution yet: say something."
        yield plot
        yield ControlList([preset_control([]), *NUMBERS], id="sampling")
        adapters = ControlList(label_width=12, id="adapters")
        adapters.empty = "None fits this model yet. a adds one."
        yield adapters
        yield Static("", id="side-hint", markup=False)

    @property
    def plot(self) -> CandidateBars:
        """The distribution."""
        return self.query_one("#plot", CandidateBars)

    @property
    def current_list(self) -> ControlList:
        """The controls in sight."""
        return self.query_one(f"#{self.page}", ControlList)

    def turn_to(self, page: Page) -> None:
        """Show this page."""
        self.page = page
        for name in ("sampling", "adapters"):
            self.query_one(f"#{name}").set_class(name != page, "hidden")
        titles = {"sampling": "Sampling", "adapters": "Adapters"}
        self.query_one("#side-title", Static).update(titles[page])
        self._hint(self.current_list.current)

    def show_sampling(self, sampling: Sampling, *, max_tokens: int, preset: str, presets: Sequence[str]) -> None:
        """Let the controls stand where `sampling` is."""
        controls = self.query_one("#sampling", ControlList)
        first = preset_control(list(presets))
        if controls.controls[0] != first:
            controls.set_controls([first, *NUMBERS])
        controls.show({**values_of(sampling, max_tokens=max_tokens), PRESET: preset or CUSTOM})

    def show_adapters(self, adapters: Sequence[ListedAdapter]) -> None:
        """List these."""
        controls = self.query_one("#adapters", ControlList)
        rows = [
            Control(str(one.path), one.name, str(one.path), -2.0, 2.0, 0.05, default=1.0, can_switch=True, zero=0.0)
            for one in adapters
        ]
        if controls.controls != rows:
            controls.set_controls(rows)
        before = controls.values
        controls.show(
            {str(one.path): one.scale or before.get(str(one.path), 1.0) for one in adapters},
            switched_off=[str(one.path) for one in adapters if not one.scale],
        )

    def show_candidates(self, candidates: Sequence[Candidate], *, chosen: int | None = None) -> None:
        """Plot these."""
        self.plot.show(candidates, chosen=chosen)

    def on_control_list_moved(self, event: ControlList.Moved) -> None:
        """Say what the control does."""
        self._hint(event.at)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of the other page do nothing."""
        return {"save_preset": "sampling", "delete_preset": "sampling", "add_adapter": "adapters"}.get(
            action, self.page
        ) == self.page

    def action_save_preset(self) -> None:
        """Ask the screen."""
        self.post_message(self.Wished("save_preset"))

    def action_delete_preset(self) -> None:
        """Ask the screen."""
        self.post_message(self.Wished("delete_preset"))

    def action_add_adapter(self) -> None:
        """Ask the screen."""
        self.post_message(self.Wished("add_adapter"))

    def _hint(self, control: Control | None) -> None:
        from edgetune.tui.visible import visible

        text = visible(control.hint) if control else ""
        self.query_one("#side-hint", Static).update(text)
