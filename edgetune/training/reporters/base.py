"""What a reporter answers: it is made when a run starts or goes on, told every measurement, and ended with the run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar, Protocol

from edgetune.artifacts import Run
from edgetune.errors import UsageError


class Reporter(Protocol):
    """One run's way to a tool that shows numbers."""

    def log(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Take what was measured at `step` of `split` ("train", "valid")."""
        ...

    def end(self, finished: bool) -> None:
        """Write what is left; `finished` is false where the run was stopped or failed."""
        ...


class ReporterClass(Protocol):
    """Makes a reporter: what is registered."""

    @classmethod
    def check(cls) -> None:
        """Raise `UsageError` where it cannot work here. Called before anything is trained."""
        ...

    def __call__(self, run: Run, step: int) -> Reporter:
        """A reporter for `run`, which has come to `step`; what it writes by default stays on this machine."""
        ...


class Installed:
    """The base of reporters that are a package away."""

    name: ClassVar[str]
    package: ClassVar[str]
    """What pip calls it, and Python too."""

    @classmethod
    def check(cls) -> None:
        """Raise `UsageError` when the package is not installed."""
        try:
            found = find_spec(cls.package) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise UsageError(f"{cls.name} is not installed.", hint=f"pip install {cls.package}")
