"""Where a run's numbers are shown besides, by name. Each reporter is a small class; `base` says what it answers.

Another package adds one with an entry point in the group "edgetune.reporters": NAME = "its.module:ReporterClass".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from edgetune.artifacts import Run
from edgetune.events import Event, Metrics, Notice, Sink
from edgetune.training.registry import Registry
from edgetune.training.reporters.base import Reporter, ReporterClass

__all__ = ["REPORTERS", "Reporter", "ReporterClass", "check_reporters", "report_to"]

REPORTERS: Registry[ReporterClass] = Registry(
    "report-to",
    "edgetune.reporters",
    {
        "tensorboard": "edgetune.training.reporters.tensorboard:TensorBoard",
        "wandb": "edgetune.training.reporters.wandb:Wandb",
        "mlflow": "edgetune.training.reporters.mlflow:Mlflow",
    },
)
"""Every known reporter."""


def check_reporters(names: Sequence[str]) -> None:
    """Raise `UsageError` for one that is not known, or whose package is not installed."""
    for name in names:
        REPORTERS.find(name).check()


@contextmanager
def report_to(names: Sequence[str], run: Run, step: int, sink: Sink) -> Iterator[Sink]:
    """A sink that also tells the reporters called `names` what is measured, until the block ends.

    `step` is how far the run has come. A reporter that fails is told of and then left out: it never stops a run.
    """
    reports = _Reports(sink)
    for name in names:
        reports.start(name, run, step)
    finished = False
    try:
        yield reports
        finished = True
    finally:
        reports.end(finished)


class _Reports:
    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.open: dict[str, Reporter] = {}

    def start(self, name: str, run: Run, step: int) -> None:
        try:
            self.open[name] = REPORTERS.find(name)(run, step)
        except Exception as error:  # noqa: BLE001  (other packages' errors are of any type)
            self._failed(name, error)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Metrics) and "replayed" not in event.extra:
            for name, reporter in list(self.open.items()):
                try:
                    reporter.log(event.step, event.split, event.values)
                except Exception as error:  # noqa: BLE001
                    del self.open[name]
                    self._failed(name, error)
        self.sink(event)

    def end(self, finished: bool) -> None:
        for name, reporter in self.open.items():
            try:
                reporter.end(finished)
            except Exception as error:  # noqa: BLE001
                self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> None:
        problem = str(error).strip().split("\n")[0] or type(error).__name__
        self.sink(Notice(f"{name} is told nothing more: {problem}", "warning"))
