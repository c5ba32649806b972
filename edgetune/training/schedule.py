"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state.

Names and curves are those of transformers; but the first step already learns, where theirs has a rate of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from edgetune.training.settings import TrainSettings

ScheduleName = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "warmup_stable_decay", "wsd"
]
"""constant and constant_with_warmup are the same here, as are warmup_stable_decay and wsd."""


@dataclass(frozen=True)
class Schedule:
    """The rate of every step of a run."""

    name: ScheduleName
    peak: float
    total: int
    """Steps in all."""
    warmup: int
    """Steps in which it rises."""
    decay: int = 0
    """warmup_stable_decay: steps in which it falls, the last ones."""
    floor: float = 0.0
    """What it falls to, as a share of `peak`."""
    power: float = 1.0
    """polynomial: how it bends."""

    @classmethod
    def of(cls, settings: TrainSettings, total: int) -> Schedule:
        """As `settings` want it for a run of `total` steps."""
        return cls(
            settings.schedule,
            settings.lr,
            total,
            warmup=count(settings.warmup, total),
            decay=count(settings.decay, total),
            floor=settings.min_lr_rate,
            power=settings.power,
        )

    def rate(self, step: int) -> float:
        """For `step`, from 0: rises linearly to the peak, then goes its way."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.name in ("constant", "constant_with_warmup"):
            return self.peak
        if self.name == "inverse_sqrt":
            scale = self.warmup or 10_000
            return self.peak / math.sqrt((step - self.warmup + scale) / scale)
        return self.peak * (self.floor + (1 - self.floor) * self._shape(step))

    def _shape(self, step: int) -> float:
        """From 1 after the warmup to almost 0 at the last step."""
        falling = max(1, self.total - self.warmup)
        if self.name in ("warmup_stable_decay", "wsd"):
            falling = max(1, min(falling, self.decay))
        left = min(1.0, 1 - (step - (self.total - falling)) / falling)
        if self.name == "linear":
            return left
        return left**self.power if self.name == "polynomial" else (1 - math.cos(math.pi * left)) / 2


def count(share: float, total: int) -> int:
    """A number of steps: a share of `total` below 1, else the number itself; no more than `total`."""
    return min(total, math.ceil(share * total) if share < 1 else int(share))
