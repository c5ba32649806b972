"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` as a number of steps: a share of `total` below 1, else the number itself."""
    return min(total, math.ceil(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, *, total: int, peak: float, warmup: int, schedule: str) -> float:
    """The rate for `step` (from 0) of `total`: rises linearly to `peak`, then falls by `schedule` to almost 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    left = 1 - (step - warmup) / max(1, total - warmup)
    return peak * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)
