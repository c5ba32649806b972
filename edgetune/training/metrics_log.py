"""`metrics.jsonl`: every number a run measured, a line each, written as it comes and read again for curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetune.events import Event, Metrics, Sink
from edgetune.paths import whole_file

METRICS = "metrics.jsonl"


class MetricsLog:
    """A sink that writes metrics to `metrics.jsonl` and hands everything on. Lines past `step` are dropped first."""

    def __init__(self, run_dir: Path, step: int, sink: Sink) -> None:
        self.path, self.step, self.sink = run_dir / METRICS, step, sink

    def __enter__(self) -> MetricsLog:
        kept = [line for line in self._lines() if _is_up_to(line, self.step)]
        with whole_file(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        for line in kept:
            values = json.loads(line)
            step, split = values.pop("step"), values.pop("split")
            self.sink(Metrics(step, values, split=split, extra={"replayed": "yes"}))
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metrics):
            self.file.write(json.dumps({"step": event.step, "split": event.split, **event.values}) + "\n")
        self.sink(event)

    def _lines(self) -> list[str]:
        if not self.step or not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _is_up_to(line: str, step: int) -> bool:
    """Whether `line` is a whole entry of a step no later than `step`; a kill may cut the last one."""
    try:
        values: Mapping[str, Any] = json.loads(line)
    except ValueError:
        return False
    return bool(values["step"] <= step)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's `metrics.jsonl`: "step", "split" and the values."""
    lines = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def points(entries: Sequence[Mapping[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    """(step, value) of every entry of `split` that has `name`."""
    return [(entry["step"], entry[name]) for entry in entries if entry["split"] == split and name in entry]


def without_metrics(sink: Sink) -> Sink:
    """`sink` without what is measured: for what is measured besides a run."""

    def hand_on(event: Event) -> None:
        if not isinstance(event, Metrics):
            sink(event)

    return hand_on
