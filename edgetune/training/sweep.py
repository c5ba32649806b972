"""Several runs that differ in a few settings, one after the other, and which of them is best by the validation rows.

Each run is one of its own, in a directory under the sweep's; `sweep.json` there says what is tried and, once it is
known, what came out. A sweep that was interrupted goes on where it was: finished runs are kept, others resumed.
Settings that change what is measured cannot be swept: their runs would not compare.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.artifacts import RUN_RECORD, SWEEP_RECORD, Run
from edgetune.errors import CorruptFileError, EdgetuneError, ResourceError, UsageError
from edgetune.events import Sink, ignore
from edgetune.paths import write_json
from edgetune.training.prepare import Prepared, prepare
from edgetune.training.run import resume, train
from edgetune.training.run_dirs import default_run_dir
from edgetune.training.settings import TrainSettings, flag_name, parse_setting

_MEASURED = {
    *("model", "data", "out", "task", "eval", "valid_share", "eval_texts", "metric", "max_length", "chat_template"),
    *("skip_bad_rows", "prefix", "src_lang", "tgt_lang", "pooling"),
}
"""Settings that say what is measured."""

_LOSS = {
    *("beta", "gamma", "dpo_loss", "label_smoothing", "orpo_lambda", "desirable_weight", "undesirable_weight"),
    *("pair_loss", "temperature", "class_weights"),
}
"""Settings of the loss itself: runs that differ in them compare by another metric alone."""

Grid = Mapping[str, Sequence[Any]]
"""Setting → the values to try."""


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """From words like "lr=1e-4,2e-4 rank=8,16". Raises `UsageError`."""
    grid: dict[str, tuple[Any, ...]] = {}
    for word in " ".join(texts).split():
        flag, equals, values = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not equals or not all(values.split(",")):
            raise UsageError(f"--sweep is {word!r}, expected SETTING=VALUE,VALUE, e.g. lr=1e-4,2e-4.")
        if name in grid:
            raise UsageError(f"--sweep names {name} twice.", hint=f"Give all its values at once: {name}=A,B,C.")
        if name in _MEASURED:
            raise UsageError(f"Runs that differ in {flag_name(name)} do not compare: it says what is measured.")
        grid[name] = tuple(dict.fromkeys(parse_setting(name, value) for value in values.split(",")))
    if not grid:
        raise UsageError("--sweep names no setting.", hint="For example: --sweep lr=1e-4,2e-4 rank=8,16")
    return grid


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    values: Mapping[str, Any]
    """What it differs in."""
    settings: TrainSettings

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.settings.out)

    def __str__(self) -> str:
        return ", ".join(f"{flag_name(name)} {value}" for name, value in self.values.items())


@dataclass(frozen=True)
class Outcome:
    """What came of a member."""

    member: Member
    value: float
    """By the sweep's metric; not a number where the run failed."""
    run: Run | None = None
    problem: str = ""
    """Why it failed."""

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        metrics = self.run.metrics if self.run else {}
        shown = {name: metrics[name] for name in ("train_loss", "valid_loss", "seconds", "step") if name in metrics}
        value = self.value if math.isfinite(self.value) else None
        told = {"path": str(self.member.path), "settings": dict(self.member.values), "value": value, **shown}
        return {**told, "error": self.problem} if self.problem else told


@dataclass(frozen=True)
class Sweep:
    """Runs to compare, under one directory."""

    path: Path
    settings: TrainSettings
    members: Sequence[Member]
    prepared: Prepared

    @property
    def metric(self) -> str:
        """What runs are ranked by."""
        return self.settings.metric or "loss"

    def run(self, member: Member, *, sink: Sink = ignore) -> Outcome:
        """Train `member`, or take what it came to before. A run that diverges or takes too much memory has failed."""
        try:
            run = self._finish(member, sink)
        except EdgetuneError as error:
            diverged = type(error) is EdgetuneError
            too_large = isinstance(error, ResourceError) and isinstance(error.__cause__, RuntimeError | MemoryError)
            if not (diverged or too_large):
                raise
            return Outcome(member, math.nan, problem=error.message)
        by_loss = self.metric == "loss"
        return Outcome(member, float(run.metrics["valid_loss"] if by_loss else run.metrics["valid"][self.metric]), run)

    def _finish(self, member: Member, sink: Sink) -> Run:
        if not (member.path / RUN_RECORD).is_file():
            return train(member.settings, sink=sink)
        known = Run.load(member.path)
        if not known.finished:
            return resume(member.path, settings=member.settings, sink=sink)
        same_data = known.data["sha256"] == self.prepared.dataset.sha256
        was = TrainSettings.from_record(known.settings).absolute()
        changed = member.settings.absolute().differences(was) + ([] if same_data else ["other data"])
        if changed:
            raise UsageError(
                f"{member.path} is finished, but was trained otherwise: {'; '.join(changed)}.",
                hint="Choose another directory with -o.",
            )
        return known

    def rank(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Best first, failed runs last; noted in the sweep's record."""
        more_is_better = self.prepared.task.metrics.get(self.metric, False)

        def order(outcome: Outcome) -> tuple[bool, float]:
            failed = not math.isfinite(outcome.value)
            return failed, 0.0 if failed else -outcome.value if more_is_better else outcome.value

        ranked = sorted(outcomes, key=order)
        record = json.loads((self.path / SWEEP_RECORD).read_text(encoding="utf-8"))
        write_json(self.path / SWEEP_RECORD, {**record, **self.record(ranked)})
        return ranked

    def record(self, ranked: Sequence[Outcome]) -> dict[str, Any]:
        """What came out, as JSON-ready values."""
        best = ranked[0] if ranked and ranked[0].run else None
        return {
            "sweep": str(self.path),
            "metric": self.metric,
            "best": str(best.member.path) if best else None,
            "runs": [outcome.record() for outcome in ranked],
        }


def open_sweep(settings: TrainSettings, grid: Grid, *, sink: Sink = ignore) -> Sweep:
    """A sweep of `settings` with every combination of `grid`'s values, new or gone on with where `settings.out` is one.

    Raises `UsageError` where its runs could not be compared, and what `prepare` raises.
    """
    settings = settings.absolute()
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for values in combinations:
        replace(settings, **values).check()
    prepared = prepare(replace(settings, **combinations[0]), sink=sink)
    _check_comparable(settings, grid, prepared)
    new = default_run_dir(prepared)
    path = Path(settings.out).expanduser() if settings.out else new.with_name(f"{new.name}-sweep")
    members = [Member(values, replace(settings, **values, out=str(path / _name(values)))) for values in combinations]
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        _check_same(path, settings, grid)
    path.mkdir(parents=True, exist_ok=True)
    shown = {name: list(values) for name, values in grid.items()}
    write_json(path / SWEEP_RECORD, {"settings": {**settings.record(), "out": str(path)}, "grid": shown})
    return Sweep(path, settings, members, prepared)


def read_sweep(path: Path) -> tuple[TrainSettings, Grid] | None:
    """What the sweep in `path` was started with; None when there is none. Raises `CorruptFileError`."""
    if not (path / SWEEP_RECORD).is_file():
        return None
    try:
        record = json.loads((path / SWEEP_RECORD).read_text(encoding="utf-8"))
        return replace(TrainSettings.from_record(record["settings"]), out=str(path)), record["grid"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path / SWEEP_RECORD} cannot be read: {error}.") from error


def _check_same(path: Path, settings: TrainSettings, grid: Grid) -> None:
    """More values may be tried than before; all else is as it was, or runs would not compare."""
    if (before := read_sweep(path)) is None:
        raise UsageError(f"{path} is there already.", hint="Choose another directory with -o.")
    was = before[0].absolute()
    swept = {name: getattr(was, name) for name in grid if name in before[1]}
    if changed := replace(settings, **swept).differences(was):
        raise UsageError(
            f"The settings are not those the sweep was started with: {'; '.join(changed)}.",
            hint=f"Go on without them (edgetune train --resume {path}), or choose another directory with -o.",
        )


def _check_comparable(settings: TrainSettings, grid: Grid, prepared: Prepared) -> None:
    if not prepared.valid:
        raise UsageError(
            "There are no validation rows to compare runs by.", hint="Put a file valid.jsonl beside the training data."
        )
    # The other rows of a batch are part of what such a task measures.
    shaping = _LOSS | (set() if prepared.task.divisible else {"batch_size"})
    if settings.metric in ("", "loss") and (odd := sorted(shaping & set(grid))):
        others = ", ".join(prepared.task.metrics)
        raise UsageError(
            f"Runs that differ in {flag_name(odd[0])} do not compare by the loss, which it changes.",
            hint=f"Compare them with --metric: {others}." if others else "",
        )


def _name(values: Mapping[str, Any]) -> str:
    """A member's directory."""
    return re.sub(r"[^\w.=+-]", "_", "-".join(f"{name.replace('_', '-')}={value}" for name, value in values.items()))
