"""Renders the events of a stage on stderr: a bar on a terminal, a few plain lines anywhere else.

Every verb that works for more than a moment wraps its stage in `show_progress`. Writes nothing to stdout; training
has a dashboard of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from edgetune.cli.terminal import plain, quiet_keyboard
from edgetune.event_lines import sink_for_parent
from edgetune.events import Event, Metrics, Notice, Progress, Sink
from edgetune.paths import bytes_text

_LINE_EVERY_S = 10.0
_TITLES = {
    "hash": "hash weights",
    "torch": "run torch",
    "llama.cpp": "run llama.cpp",
    "bound": "find bound",
    "effect": "check effect",
}
"""What a stage is called here, where its own name says too little."""


@contextmanager
def show_progress() -> Iterator[Sink]:
    """Yield a sink that renders to stderr until the block ends."""
    if (parent := sink_for_parent()) is not None:
        yield parent
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars() as sink:
            yield sink
    else:
        yield _Lines()


def say(text: str, *, warning: bool = False) -> None:
    """One line for a person, on stderr."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    click.secho(plain(f"{'warning: ' if warning else ''}{text}"), err=True, fg="yellow" if warning and colour else None)


def amount(value: float, unit: str) -> str:
    """`value` with its unit, bytes as kB, MB, GB."""
    if unit != "bytes":
        return f"{value:,.0f}{f' {unit}' if unit else ''}"
    return bytes_text(value)


class _Lines:
    """A line every ten seconds of a stage, and one when such a long one is done; short ones are not worth a line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage = ""
        self._last = self._started = 0.0
        self._finished = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            say(event.text, warning=event.level == "warning")
        elif isinstance(event, Progress):
            self._progress(event)
        elif isinstance(event, Metrics):
            values = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
            say(f"step {event.step} ({event.split}): {values}")

    def _progress(self, event: Progress) -> None:
        if event.stage != self._stage:
            self._stage, self._last, self._finished = event.stage, self._clock(), False
            self._started = self._last
        if self._finished:
            return
        title = _TITLES.get(event.stage, event.stage)
        if event.total and event.done >= event.total:
            self._finished = True
            if self._clock() - self._started >= _LINE_EVERY_S:
                say(f"{title}: done, {amount(event.total, event.unit)}")
        elif self._clock() - self._last >= _LINE_EVERY_S:
            self._last = self._clock()
            share = f"{event.done / event.total:.0%} of {amount(event.total, event.unit)}" if event.total else ""
            say(f"{title}: {share or amount(event.done, event.unit)}, {event.label}".rstrip(", "))


@contextmanager
def _bars() -> Iterator[Sink]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    bars = Bars(
        TextColumn("[bold]{task.description:<13}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}% [dim]{task.fields[size]:>9}[/]"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[label]}", table_column=_one_line()),
        console=console,
        transient=True,
        expand=True,
    )
    tasks: dict[str, TaskID] = {}

    def sink(event: Event) -> None:
        if isinstance(event, Notice):
            style = "yellow" if event.level == "warning" else None
            console.print(plain(event.text), style=style, markup=False, highlight=False, soft_wrap=True)
        elif isinstance(event, Progress):
            size = amount(event.total, event.unit) if event.total else ""
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(_TITLES.get(event.stage, event.stage), size=size, label="")
            finished = bool(event.total) and event.done >= event.total
            bars.update(
                tasks[event.stage],
                completed=event.done,
                total=event.total or None,
                size=size,
                label="" if finished else _escape(event.label),
            )

    # What is typed meanwhile would tear the bars apart; it is there for whoever reads next.
    with quiet_keyboard(), bars:
        yield sink


def _one_line() -> Any:
    from rich.table import Column

    return Column(no_wrap=True, overflow="ellipsis", ratio=1)


def _escape(label: str) -> str:
    from rich.markup import escape

    return escape(plain(label))
