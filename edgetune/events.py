"""What a stage tells its caller while it works.

A stage takes a `Sink` and calls it with these frozen values; it never prints. The command line turns them into Rich,
a full-screen app into widgets, a test into a list. Anything a caller must act on is a return value or an error instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """A stage moved on: `done` of `total` `unit`s."""

    stage: str
    """Verb in the present, e.g. "write", "hash", "quantize", "verify", "train"."""
    done: float
    """Work finished, in `unit`."""
    total: float
    """Work in all, in `unit`; 0 when unknown."""
    unit: str = ""
    """"bytes", "tensors", "steps", "rows", "tokens"."""
    label: str = ""
    """What is being worked on now, e.g. a tensor's name and shape."""


@dataclass(frozen=True)
class Notice:
    """Something a person should know and need not act on at once."""

    text: str
    level: Literal["info", "warning"] = "info"


@dataclass(frozen=True)
class Metrics:
    """Numbers measured at a step, e.g. loss, lr, tokens_per_second, memory_bytes."""

    step: int
    values: Mapping[str, float]
    split: str = "train"
    """"train", "valid" or "test"."""
    extra: Mapping[str, str] = field(default_factory=dict)


Event = Progress | Notice | Metrics
Sink = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The sink for callers that do not listen."""
