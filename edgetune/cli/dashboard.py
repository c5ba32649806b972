"""How training looks: a live dashboard on a terminal, a few plain lines anywhere else. Renders events, decides nothing.

Writes to stderr alone; stdout belongs to the run's path.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgetune.cli.progress import amount, say
from edgetune.cli.terminal import plain, quiet_keyboard
from edgetune.event_lines import sink_for_parent
from edgetune.events import Event, Metrics, Notice, Progress, Sink, ignore
from edgetune.plot import braille_plot
from edgetune.training.processes import leads

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PLOT_ROWS = 7
_LINES_A_RUN = 20
_LINE_EVERY_S = 10.0


@contextmanager
def show_training() -> Iterator[Sink]:
    """Yield a sink that shows a run on stderr until the block ends."""
    if not leads():
        yield ignore
    elif (parent := sink_for_parent()) is not None:
        yield parent
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _live() as sink:
            yield sink
    else:
        yield PlainLines()


class PlainLines:
    """About twenty lines a run, and one every ten seconds when steps are slow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last = clock, clock()
        self._eta = Eta(clock)
        self._metrics: Metrics | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            say(event.text, warning=event.level == "warning")
        elif isinstance(event, Metrics) and event.split == "valid":
            if not event.extra:
                say(f"step {event.step}: validation loss {event.values['loss']:.4f}")
        elif isinstance(event, Metrics):
            self._metrics = event
        elif event.stage == "train" and self._metrics is not None:
            self._step(event, self._metrics)

    def _step(self, progress: Progress, metrics: Metrics) -> None:
        self._eta.step(progress)
        every = max(1, int(progress.total) // _LINES_A_RUN)
        due = metrics.step % every == 0 or metrics.step in (1, progress.total)
        if not due and self._clock() - self._last < _LINE_EVERY_S:
            return
        self._last = self._clock()
        values = metrics.values
        say(
            f"step {metrics.step}/{progress.total:.0f}: loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, {amount(values['memory_bytes'], 'bytes')}, "
            f"{self._eta.text} left"
        )


class Eta:
    """How long the rest will take, by the pace of this process so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, float] | None = None
        self.text = "?"
        """Minutes and seconds, or "?" before two steps are done."""

    def step(self, progress: Progress) -> None:
        """Take note of a step."""
        now = self._clock()
        if self._first is None:
            self._first = (progress.done, now)
            return
        done = progress.done - self._first[0]
        if done > 0:
            self.text = duration((now - self._first[1]) / done * (progress.total - progress.done))


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 1:02:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def _live() -> Iterator[Sink]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    board = Dashboard()
    live = Live(console=console, get_renderable=lambda: board.render(console.width), refresh_per_second=8)
    # What is typed meanwhile would tear the board apart.
    with quiet_keyboard(), live:

        def sink(event: Event) -> None:
            if isinstance(event, Notice):
                style = "yellow" if event.level == "warning" else None
                live.console.print(plain(event.text), style=style, markup=False, highlight=False, soft_wrap=True)
            else:
                board.take(event)

        yield sink


class Dashboard:
    """What a run shows: progress, numbers, and the loss so far. Knows no terminal; `render` makes what Rich draws."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._eta = Eta(clock)
        self._train: list[tuple[int, float]] = []
        self._valid: list[tuple[int, float]] = []
        self._newest: Metrics | None = None
        self._steps: Progress | None = None
        self._stage: Progress | None = None
        self._speeds: list[float] = []

    def take(self, event: Metrics | Progress) -> None:
        """Take note of an event."""
        if isinstance(event, Progress):
            self._stage = event
            if event.stage == "train":
                self._steps = event
                self._eta.step(event)
            return
        (self._valid if event.split == "valid" else self._train).append((event.step, event.values["loss"]))
        if event.split == "train":
            self._newest = event
            self._speeds = [*self._speeds[-19:], event.values["tokens_per_second"]]

    def render(self, width: int) -> RenderableType:
        """The dashboard as of now, for a terminal of `width` columns."""
        from rich.console import Group
        from rich.panel import Panel

        width = min(width, 110)
        parts: list[Any] = [self._bar(width - 4)]
        if self._newest is not None:
            parts += [self._numbers(), self._plot(width - 6)]
        elapsed = duration(self._clock() - self._started)
        return Panel(Group(*parts), title="training", subtitle=elapsed, width=width, border_style="blue")

    def _bar(self, width: int) -> RenderableType:
        from rich.columns import Columns
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        evaluating = self._stage is not None and self._stage.stage != "train" and self._stage.done < self._stage.total
        shown = self._stage if evaluating or self._steps is None else self._steps
        if shown is None:
            return Text("loading …", style="dim")
        label = f"{shown.stage} {shown.done:.0f}/{shown.total:.0f} {shown.unit}"
        if shown is self._steps:
            label += f"  {self._eta.text} left"
        bar = ProgressBar(total=shown.total or None, completed=shown.done, width=max(10, width - len(label) - 2))
        return Columns([bar, Text(label)], padding=(0, 2))

    def _numbers(self) -> RenderableType:
        from rich.text import Text

        assert self._newest is not None
        values = self._newest.values
        speed = sum(self._speeds) / len(self._speeds)
        shown = [
            ("loss", f"{_smoothed(self._train):.4f}"),
            ("lr", f"{values['lr']:.1e}"),
            ("epoch", f"{values['epoch']:.2f}"),
            ("tokens/s", f"{speed:,.0f}"),
            ("memory", amount(values["memory_bytes"], "bytes")),
        ]
        if self._valid:
            first, last = self._valid[0][1], self._valid[-1][1]
            shown.insert(1, ("valid", f"{first:.4f} → {last:.4f}" if len(self._valid) > 1 else f"{last:.4f}"))
        text = Text()
        for name, value in shown:
            text.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
        return text

    def _plot(self, width: int) -> RenderableType:
        from rich.text import Text

        losses = [loss for _, loss in self._train]
        top, bottom = max(losses), min(losses)
        rows = braille_plot(losses, columns=max(10, width - 8), rows=_PLOT_ROWS)
        text = Text()
        for index, row in enumerate(rows):
            label = f"{top:.2f}" if index == 0 else f"{bottom:.2f}" if index == len(rows) - 1 else ""
            text.append(f"{label:>6} ", style="dim").append(row, style="cyan")
            text.append("\n" if index < len(rows) - 1 else "")
        return text


def _smoothed(points: Sequence[tuple[int, float]]) -> float:
    newest = [loss for _, loss in points[-10:]]
    return sum(newest) / len(newest)


def show_preview(console: Console, pieces: Sequence[tuple[str, bool]], *, most: int) -> None:
    """Print one sequence, what is learned in green, the rest dim; without colours, what is learned stands in « »."""
    from rich.text import Text

    text, inside = Text(), False
    marks = console.no_color or not console.is_terminal
    for piece, learned in pieces[:most]:
        if marks and learned != inside:
            text.append("«" if learned else "»")
        inside = learned
        text.append(piece, style="bold green" if learned else "dim")
    if marks and inside:
        text.append("»")
    if len(pieces) > most:
        text.append(f" … {len(pieces) - most} more tokens", style="dim italic")
    console.print(text, soft_wrap=True, highlight=False)
