"""Controls one under the other: numbers on a slider, choices, switches; by keyboard and by mouse.

Knows nothing of what they control: a table of `Control`s goes in, `Changed` comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from edgetune.tui.palette import Palette
from edgetune.tui.strips import strip_of
from edgetune.tui.visible import one_line

Value = float | str
_VALUE_WIDTH = 7
_SHORTEST_LABEL = 4
_COARSE = 10
"""How many steps Shift makes of one."""


@dataclass(frozen=True)
class Control:
    """One line."""

    name: str
    label: str
    hint: str = ""
    low: float = 0.0
    high: float = 1.0
    """The slider's ends; what is typed may lie beyond them."""
    step: float = 0.05
    digits: int = 2
    default: float = 0.0
    choices: tuple[str, ...] = ()
    """Where this is a choice, not a number."""
    can_switch: bool = False
    """Whether Space turns it on and off."""
    zero: float | None = None
    """Where the slider begins; its low end unless given."""
    unset: str = ""
    """What the lowest value is called."""

    def shown(self, value: Value) -> str:
        """The value for people."""
        if isinstance(value, str):
            return value
        if self.unset and value <= self.low:
            return self.unset
        return f"{value:.{self.digits}f}"


class ControlList(ScrollView, can_focus=True):
    """The lines; the cursor is on one of them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Control above or below", show=False),
        Binding("down,j", "move(1)", "Control above or below", show=False),
        Binding("left,h", "step(-1)", "Less or more", show=False),
        Binding("right,l", "step(1)", "Less or more", show=False),
        Binding("shift+left", f"step(-{_COARSE})", "Much less or more", show=False),
        Binding("shift+right", f"step({_COARSE})", "Much less or more", show=False),
        Binding("space", "switch", "On or off", show=False),
        Binding("x,delete", "reset", "Back to the default", show=False),
        Binding("enter", "accept", "Take the number typed", show=False),
    ]

    class Changed(Message):
        """A control has another value; None where a switch was turned."""

        def __init__(self, source: ControlList, name: str, value: Value | None) -> None:
            super().__init__()
            self.source, self.name, self.value = source, name, value

        @property
        def control(self) -> ControlList:
            """For `on` selectors."""
            return self.source

    class Moved(Message):
        """The cursor is on another control."""

        def __init__(self, source: ControlList, control: Control | None) -> None:
            super().__init__()
            self.source, self.at = source, control

    def __init__(self, controls: Sequence[Control] = (), *, label_width: int = 11, id: str | None = None) -> None:
        super().__init__(id=id)
        self.controls = list(controls)
        self.values: dict[str, Value] = {}
        self.switched_off: set[str] = set()
        self.cursor = 0
        self.empty = ""
        """What stands here while there are no controls."""
        self.told = 0
        """How many changes were told of; whoever heard fewer must not draw values yet."""
        self._label_width = label_width
        self._typed = ""
        self._is_dragging = False

    def show(self, values: Mapping[str, Value], *, switched_off: Sequence[str] = ()) -> None:
        """Draw these values."""
        if dict(values) != self.values or set(switched_off) != self.switched_off:
            self.values, self.switched_off = dict(values), set(switched_off)
            self.refresh()

    def set_controls(self, controls: Sequence[Control]) -> None:
        """Other lines."""
        self.controls = list(controls)
        self.cursor = min(self.cursor, max(len(controls) - 1, 0))
        self._measure()
        self.refresh()

    @property
    def current(self) -> Control | None:
        """The control under the cursor."""
        return self.controls[self.cursor] if self.controls else None

    # -- drawing

    def render_line(self, y: int) -> Strip:
        """One control."""
        base, width, row = self.rich_style, self.size.width, y + self.scroll_offset.y
        palette = Palette.of(self.app)
        if not self.controls and row == 0:
            text = Text(self.empty, palette.muted)
        elif row < len(self.controls):
            text = self._row(row, width, palette)
        else:
            text = Text()
        return strip_of(text, base, width=width)

    def _row(self, row: int, width: int, palette: Palette) -> Text:
        control = self.controls[row]
        is_current = row == self.cursor and self.has_focus
        is_off = control.name in self.switched_off
        value = self.values.get(control.name, control.default)
        is_default = value == (control.choices[0] if control.choices else control.default) or is_off
        label_width = self._label_room(control)
        label = one_line(control.label)[:label_width]
        text = Text("▌" if is_current else " ", palette.ink("accent"))
        if control.can_switch:
            text.append("○ " if is_off else "● ", palette.muted if is_off else palette.ink("success"))
        name_style = palette.ink("foreground", bold=is_current) if is_current or not is_default else palette.muted
        text.append(label + " " * (label_width - cell_len(label) + 1), name_style)
        if control.choices:
            room = max(width - cell_len(text.plain) - 4, 1)
            text.append("‹ ", palette.ink("accent") if is_current else palette.faint)
            text.append(one_line(str(value), length=room), palette.ink("foreground", bold=True))
            return text.append(" ›", palette.ink("accent") if is_current else palette.faint)
        is_typed = is_current and self._typed
        shown = f"{self._typed}▏" if is_typed else control.shown(value)
        style = palette.cursor if is_typed else palette.muted if is_default else palette.ink("accent", bold=True)
        text.append(f"{shown:>{_VALUE_WIDTH}}", style).append(" ")
        return text.append_text(self._slider(control, float(value), width - cell_len(text.plain) - 1, palette, is_off))

    def _slider(self, control: Control, value: float, width: int, palette: Palette, is_off: bool) -> Text:
        if width < 3:
            return Text()
        last = width - 1
        place = round(_share(control, value) * last)
        start = round(_share(control, control.zero if control.zero is not None else control.low) * last)
        low, high = sorted((place, start))
        text = Text("─" * width, palette.faint)
        if not is_off:
            text.stylize(palette.ink("accent"), low, high + 1)
        if control.zero is not None and 0 < start < last:
            text = Text(text.plain[:start] + "┼" + text.plain[start + 1 :], spans=text.spans, style=palette.faint)
        knob = "○" if is_off else "●"
        style = palette.muted if is_off else palette.ink("accent", bold=True)
        drawn = Text(text.plain[:place] + knob + text.plain[place + 1 :], spans=text.spans, style=palette.faint)
        drawn.stylize(style, place, place + 1)
        return drawn

    def _measure(self) -> None:
        self.virtual_size = Size(self.size.width, max(len(self.controls), 1))

    def on_resize(self) -> None:
        """All lines are as wide as the list."""
        self._measure()

    def on_mount(self) -> None:
        """Follow the theme."""
        self._measure()
        self.app.theme_changed_signal.subscribe(self, lambda theme: self.refresh())

    def on_focus(self) -> None:
        """The cursor appears."""
        self.post_message(self.Moved(self, self.current))
        self.refresh()

    def on_blur(self) -> None:
        """A number half typed is dropped."""
        self._typed = ""
        self.refresh()

    # -- keys and mouse

    def on_key(self, event: events.Key) -> None:
        """A number may be typed."""
        control = self.current
        if control is None or control.choices:
            return
        if event.character and event.character in "0123456789.-":
            self._typed += event.character
        elif event.key == "backspace" and self._typed:
            self._typed = self._typed[:-1]
        elif event.key == "escape" and self._typed:
            self._typed = ""
        else:
            return
        event.stop()
        event.prevent_default()
        self.refresh()

    def action_move(self, step: int) -> None:
        """Another control."""
        self.action_accept()
        self.cursor = min(max(self.cursor + step, 0), max(len(self.controls) - 1, 0))
        top, room = self.scroll_offset.y, max(self.size.height, 1)
        if not top <= self.cursor < top + room:
            self.scroll_to(
                y=self.cursor if self.cursor < top else self.cursor - room + 1, animate=False, immediate=True
            )
        self.post_message(self.Moved(self, self.current))
        self.refresh()

    def action_step(self, step: int) -> None:
        """Less or more."""
        control = self.current
        if control is None:
            return
        value = self.values.get(control.name, control.default)
        if control.choices:
            at = control.choices.index(str(value)) if value in control.choices else 0
            self._change(control, control.choices[(at + (1 if step > 0 else -1)) % len(control.choices)])
            return
        number = round(round(float(value) / control.step) * control.step + step * control.step, 6)
        self._change(control, min(max(number, control.low), control.high))

    def action_switch(self) -> None:
        """On or off."""
        if (control := self.current) is not None and control.can_switch:
            self._tell(control.name, None)

    def action_reset(self) -> None:
        """The default."""
        self._typed = ""
        if (control := self.current) is not None:
            self._change(control, control.choices[0] if control.choices else control.default)

    def action_accept(self) -> None:
        """Take what was typed."""
        control, typed, self._typed = self.current, self._typed, ""
        if control is None or not typed:
            return
        try:
            self._change(control, float(typed))
        except ValueError:
            self.app.bell()
        self.refresh()

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Choose a control; on its slider, its value; on its switch, turn it."""
        row = event.y + self.scroll_offset.y
        if row >= len(self.controls):
            return
        self.focus()
        self.cursor = row
        control = self.controls[row]
        if control.can_switch and event.x < 3:
            self.action_switch()
        elif control.choices:
            self.action_step(1)
        elif event.x >= self._slider_start(control):
            self._is_dragging = True
            self.capture_mouse()
            self._set_by_mouse(event.x)
        self.post_message(self.Moved(self, control))
        self.refresh()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Drag."""
        if self._is_dragging:
            self._set_by_mouse(event.x)

    def on_mouse_up(self) -> None:
        """Let go."""
        if self._is_dragging:
            self._is_dragging = False
            self.release_mouse()

    def _label_room(self, control: Control) -> int:
        """How wide a label may be; a narrow panel keeps room for the values."""
        beside = self._slider_start(control, label_width=0)
        return max(min(self._label_width, self.size.width - beside), _SHORTEST_LABEL)

    def _slider_start(self, control: Control, *, label_width: int | None = None) -> int:
        label_width = self._label_room(control) if label_width is None else label_width
        return 1 + (2 if control.can_switch else 0) + label_width + 1 + _VALUE_WIDTH + 1

    def _set_by_mouse(self, x: int) -> None:
        control = self.current
        if control is None:
            return
        start = self._slider_start(control)
        last = max(self.size.width - start - 2, 1)
        share = min(max((x - start) / last, 0.0), 1.0)
        number = control.low + share * (control.high - control.low)
        self._change(control, round(round(number / control.step) * control.step, 6))

    def _tell(self, name: str, value: Value | None) -> None:
        self.told += 1
        self.post_message(self.Changed(self, name, value))

    def _change(self, control: Control, value: Value) -> None:
        if value != self.values.get(control.name, control.default) or control.name in self.switched_off:
            self.values[control.name] = value
            self._tell(control.name, value)
            self.refresh()


def _share(control: Control, value: float) -> float:
    """Where on the slider a value is."""
    span = control.high - control.low
    return min(max((value - control.low) / span, 0.0), 1.0) if span else 0.0
