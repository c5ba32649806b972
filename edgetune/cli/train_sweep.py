"""`edgetune train --sweep`: the runs one after the other, each under the dashboard, then their ranking."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.artifacts import SWEEP_RECORD
from edgetune.cli.dashboard import duration, show_training
from edgetune.cli.progress import say, show_progress
from edgetune.cli.train import show_plan, tell_run
from edgetune.errors import EdgetuneError, InterruptedRun
from edgetune.training.settings import flag_name, merge_settings

if TYPE_CHECKING:
    from edgetune.training.sweep import Outcome, Sweep


def train_sweep(
    given: Mapping[str, Any], words: Sequence[str], resume: str | None, *, dry_run: bool, as_json: bool
) -> None:
    """Run what `words` name, or the sweep in `resume`; the best run's path goes to stdout."""
    from edgetune.training.sweep import open_sweep, parse_grid, read_sweep

    known = read_sweep(Path(resume)) if resume else None
    settings = merge_settings(known[0].record() if known else {}, given)
    grid = known[1] if known and not words else parse_grid(words)
    if dry_run:
        tried = (f"{flag_name(name)} {' '.join(map(str, values))}" for name, values in grid.items())
        say(f"{math.prod(map(len, grid.values()))} runs: {', '.join(tried)}")
        show_plan(replace(settings, **{name: values[0] for name, values in grid.items()}), as_json=as_json)
        return
    with show_progress() as sink:
        sweep = open_sweep(settings, grid, sink=sink)
    ranked = sweep.rank(_run_all(sweep))
    if (best := ranked[0].run) is None:
        raise EdgetuneError("Every run of the sweep failed.", hint=f"What became of each: {sweep.path / SWEEP_RECORD}")
    _show_ranking(sweep, ranked)
    tell_run(best)
    click.echo(json.dumps(sweep.record(ranked), ensure_ascii=False) if as_json else str(best.path))


def _run_all(sweep: Sweep) -> list[Outcome]:
    outcomes = []
    for number, member in enumerate(sweep.members, 1):
        say(f"Run {number} of {len(sweep.members)}: {member}")
        try:
            with show_training() as sink:
                outcome = sweep.run(member, sink=sink)
        except InterruptedRun as error:
            raise InterruptedRun(error.message, hint=f"To go on: edgetune train --resume {sweep.path}") from error
        if outcome.problem:
            say(outcome.problem, warning=True)
        outcomes.append(outcome)
    return outcomes


def _show_ranking(sweep: Sweep, ranked: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    names = list(ranked[0].member.values)
    for title in ("", *map(flag_name, names), f"validation {sweep.metric}", "training loss", "took"):
        table.add_column(title, justify="right")
    for place, outcome in enumerate(ranked, 1):
        told = ["failed"]
        if outcome.run:
            metrics = outcome.run.metrics
            told = [f"{outcome.value:.4f}", f"{metrics['train_loss']:.4f}", duration(metrics["seconds"])]
        table.add_row(str(place), *(str(outcome.member.values[name]) for name in names), *told)
    Console(stderr=True).print(table)
