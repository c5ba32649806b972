"""What a stage that runs has told so far, as lines under the home screen; and a run's loss as a curve."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from edgetune.events import Event, Metrics, Notice, Progress
from edgetune.paths import bytes_text
from edgetune.plot import braille_plot
from edgetune.tui.palette import Palette
from edgetune.tui.stages import (
    StageEnd,
)
from edgetune.tui.visible import one_line, visible

_NOTICES = 3
_OUTPUT_LINES = 8


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
