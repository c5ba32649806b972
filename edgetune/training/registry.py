"""Names → the objects they stand for: this package's own, and those that other packages register by entry point.

Standard library alone; an object's module is imported when it is asked for, so that listing names costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from edgetune.errors import UsageError

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Registry(Generic[Thing]):
    """Objects of one sort by name."""

    setting: str
    """The setting that names one, e.g. "task"."""
    group: str
    """Entry point group that other packages register theirs in, as NAME = "module:object"."""
    own: Mapping[str, str]
    """This package's: name → "module:object". A name of another package never replaces one of these."""

    def names(self) -> list[str]:
        """Every name, this package's first."""
        return [*self.own, *sorted(name for name in self._others() if name not in self.own)]

    def check(self, name: str) -> None:
        """Raise `UsageError` when there is no `name`."""
        if name not in self.own and name not in self._others():
            names = self.names()
            close = get_close_matches(name, names, n=1)
            hint = f"Did you mean {close[0]}?" if close else ""
            raise UsageError(f"{self.setting} is {name!r}, expected one of {', '.join(names)}.", hint=hint)

    def find(self, name: str) -> Thing:
        """The object called `name`. Raises `UsageError` when there is none, or when its package cannot be imported."""
        self.check(name)
        if name in self.own:
            module, _, attribute = self.own[name].partition(":")
            found: Thing = getattr(import_module(module), attribute)
            return found
        entry: Any = self._others()[name]
        try:
            loaded: Thing = entry.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"The {self.setting} {name} ({entry.value}) cannot be loaded: {error}.") from error
        return loaded

    def _others(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}
