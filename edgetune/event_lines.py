"""Events as lines of JSON, for a stage that runs in a child process: what its sink hears, its parent's sink hears too.

With `EDGETUNE_EVENTS` set to "json" the command line writes them to stderr in place of bars and plain lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

from edgetune.events import Event, Metrics, Notice, Progress, Sink

EVENTS_VARIABLE = "EDGETUNE_EVENTS"
"""The environment variable that asks for them."""
_KINDS: dict[str, type[Progress | Notice | Metrics]] = {"progress": Progress, "notice": Notice, "metrics": Metrics}
_SHORTEST_S = 0.05
"""Progress within one piece of work is not told more often than this."""


def sink_for_parent() -> Sink | None:
    """A sink that writes lines to stderr; None where nobody asked for them."""
    return EventLines() if os.environ.get(EVENTS_VARIABLE) == "json" else None


def event_line(event: Event) -> str:
    """`event` as one line."""
    kind = next(name for name, of in _KINDS.items() if isinstance(event, of))
    return json.dumps({"event": kind, **asdict(event)})


def read_event(line: str) -> Event | None:
    """The event that `line` stands for; None for any other text."""
    if not line.startswith('{"event": '):
        return None
    try:
        values: dict[str, Any] = json.loads(line)
        return _KINDS[values.pop("event")](**values)
    except (ValueError, KeyError, TypeError):
        return None


class EventLines:
    """A sink on stderr."""

    def __init__(self) -> None:
        self._stage, self._told = "", 0.0

    def __call__(self, event: Event) -> None:
        """Write `event`, unless it is progress that the next one will soon be ahead of."""
        if isinstance(event, Progress):
            now = time.monotonic()
            is_last = bool(event.total) and event.done >= event.total
            if event.stage == self._stage and not is_last and now - self._told < _SHORTEST_S:
                return
            self._stage, self._told = event.stage, now
        sys.stderr.write(event_line(event) + "\n")
        sys.stderr.flush()
