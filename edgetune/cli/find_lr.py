"""`edgetune train --find-lr`: the curve on stderr, the suggestion alone on stdout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from edgetune.cli.progress import say, show_progress
from edgetune.training.settings import TrainSettings

if TYPE_CHECKING:
    from edgetune.training.find_lr import LrCurve

_COLUMNS, _ROWS = 72, 10


def show_search(settings: TrainSettings, *, as_json: bool) -> None:
    """Look for a learning rate and show what was found. Raises what `find_lr` raises."""
    from edgetune.training.find_lr import find_lr

    with show_progress() as sink:
        curve = find_lr(settings, sink=sink)
    if as_json:
        click.echo(json.dumps(curve.record()))
        return
    _draw(curve)
    end = "is least" if curve.diverged else "still falls at the highest rate tried, and is least"
    say(f"The loss falls fastest at {curve.steepest:.1e} and {end} at {curve.lowest:.1e}.")
    say(f"Next: the same command without --find-lr and with --lr {curve.suggestion:g}, halfway between")
    click.echo(f"{curve.suggestion:g}")


def _draw(curve: LrCurve) -> None:
    from edgetune.plot import braille_plot

    # What comes after the turn would press the rest into a line.
    top = max(curve.losses[0], curve.losses[len(curve.losses) // 4]) * 1.1
    shown = [min(loss, top) for loss in curve.losses]
    lines = braille_plot(shown, columns=min(_COLUMNS, (len(shown) + 1) // 2), rows=_ROWS)
    for index, line in enumerate(lines):
        label = f"{max(shown):.3f}" if index == 0 else f"{min(shown):.3f}" if index == len(lines) - 1 else ""
        say(f"{label:>8} {line}")
    say(f"{'lr':>8} {curve.rates[0]:.0e}{curve.rates[-1]:>{max(1, len(lines[0]) - 5)}.0e}")
