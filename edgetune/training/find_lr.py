"""A learning rate for this model and these data: raised step by step until the loss turns (Smith 2015).

A run of a hundred steps in memory, whose rate grows by the same factor each step. After each, the loss of the same few
rows is measured, so that the curve shows what the rate did and not which rows came. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgetune.errors import EdgetuneError, UsageError
from edgetune.events import Sink, ignore
from edgetune.training.assembly import assemble
from edgetune.training.evaluate import chosen_rows
from edgetune.training.loop import Loop
from edgetune.training.metrics_log import without_metrics
from edgetune.training.prepare import plan, prepare
from edgetune.training.processes import world_size
from edgetune.training.settings import TrainSettings

STEPS = 100
LOWEST, HIGHEST = 1e-6, 1.0

_PROBED = 16
"""Rows that the loss is measured on."""
_DIVERGED = 0.5
"""The search ends when the loss has risen from its least by this share of what it had fallen, and past its start."""
_SMOOTHED = 5
"""Points that a slope is taken over."""


@dataclass(frozen=True)
class LrCurve:
    """The loss by learning rate, and what follows from it."""

    rates: Sequence[float]
    losses: Sequence[float]
    """After a step with each of `rates`."""
    suggestion: float
    """Halfway, by factors, between `steepest` and `lowest`, to two digits: a peak for a rate that rises and falls."""
    steepest: float
    """Where the loss falls fastest."""
    lowest: float
    """Where it is least: the highest rate that still helps, too high for a whole run."""
    diverged: bool
    """Whether the loss rose again in the end; else the highest rate tried was not too high."""

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        points = [{"lr": rate, "loss": loss} for rate, loss in zip(self.rates, self.losses, strict=True)]
        told = {"suggestion": self.suggestion, "steepest": self.steepest, "lowest": self.lowest}
        return {**told, "diverged": self.diverged, "curve": points}


def find_lr(settings: TrainSettings, *, sink: Sink = ignore) -> LrCurve:
    """Try learning rates from 1e-6 to 1 on `settings`' model and data.

    `settings.steps` says in how many steps; by default a hundred. Raises `UsageError`, what `prepare` raises, and
    `EdgetuneError` when the loss falls at none of them.
    """
    if world_size() > 1:
        raise UsageError("The learning rate is looked for by one process.", hint="Start it without the launcher.")
    steps = settings.steps or STEPS
    if steps < 2 * _SMOOTHED:
        raise UsageError(f"--steps is {steps}, expected {2 * _SMOOTHED} or more to find a learning rate.")
    settings = replace(settings.absolute(), steps=steps)
    prepared = prepare(settings, sink=sink)
    parts = assemble(settings, prepared, plan(settings, prepared, sink=sink), sink=sink)
    factor = (HIGHEST / LOWEST) ** (1 / (steps - 1))
    loop = Loop(
        adapted=parts.adapted,
        task=prepared.task,
        optimizer=parts.optimizer,
        train=prepared.train,
        mix=prepared.mix,
        valid=(),
        settings=settings,
        device=parts.device,
        sink=without_metrics(sink),
        save=lambda position: None,
        keep_best=lambda position: None,
        should_stop=lambda: False,
        layout=parts.layout,
        dtype=parts.dtype,
        rate=lambda step: LOWEST * factor**step,
    )
    rows = chosen_rows(prepared.valid or prepared.train, _PROBED)
    loop.adapted.train()
    losses = [_loss(loop, rows)]
    while loop.position.step < steps and not _turned(losses):
        try:
            loop.take_step()
        except EdgetuneError as error:
            if type(error) is not EdgetuneError or loop.position.step < 2 * _SMOOTHED:
                raise
            break  # no longer a number: this rate is far too high
        losses.append(_loss(loop, rows))
    return read_curve([LOWEST * factor**step for step in range(len(losses) - 1)], losses)


def read_curve(rates: Sequence[float], losses: Sequence[float]) -> LrCurve:
    """What `losses` (before the first step, then after each) say. Raises `EdgetuneError` when they never fall."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    values = np.array(finite[1:])
    least = int(values.argmin()) if len(values) else 0
    if least < _SMOOTHED or not values[least] < finite[0]:
        raise EdgetuneError(
            f"The loss falls at no learning rate from {LOWEST:g} on.", hint="Look at the data, or give more --steps."
        )
    # Over the logarithm of the rate, which grows by the same each step.
    slopes = (values[_SMOOTHED : least + 1] - values[: least + 1 - _SMOOTHED]) / _SMOOTHED
    steepest, lowest = rates[int(slopes.argmin()) + _SMOOTHED // 2], rates[least]
    suggestion = float(f"{math.sqrt(steepest * lowest):.1e}")
    risen = len(finite) < len(losses) or float(values[-1]) > float(values[least]) * 1.02
    return LrCurve(tuple(rates[: len(values)]), tuple(values.tolist()), suggestion, steepest, lowest, risen)


def _turned(losses: Sequence[float]) -> bool:
    """Whether the loss has risen so far above its least that higher rates are of no use."""
    newest, least = losses[-1], min(losses)
    return not math.isfinite(newest) or newest > losses[0] + _DIVERGED * max(losses[0] - least, 0.1 * abs(losses[0]))


def _loss(loop: Loop, rows: Sequence[Any]) -> float:
    """The mean loss of `rows` as the model stands."""
    import torch

    total, denominator, size = 0.0, 0.0, loop.settings.batch_size
    loop.adapted.eval()
    try:
        with torch.no_grad(), loop.autocast():
            for at in range(0, len(rows), size):
                for batch in loop.layout.batches([rows[at : at + size]]):
                    total += float(loop.task.summed_loss(loop.adapted, batch))
                    denominator += batch.denominator
    finally:
        loop.adapted.train()
    return total / denominator
