"""The training loop: the only one there is.

It is our own and not `transformers.Trainer`, for three reasons. A run resumed after a kill must equal the
uninterrupted one bit for bit, which takes knowing every state there is (here: adapter, moments, random states, one
step number). Progress must leave as events, to any front end. And the loss of an accumulated batch must be the mean
over all its learned tokens, however they are spread over the parts; no setting that nobody asked for may change that.

What is trained for (batches, loss, measures) is the `Task` it is handed: a variant is another value, never a second
loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgetune.data import TrainingSequence
from edgetune.errors import EdgetuneError
from edgetune.events import Metrics, Notice, Progress, Sink
from edgetune.training.batches import epoch_batches
from edgetune.training.checkpoint import Position
from edgetune.training.device import (
    is_out_of_memory,
    memory_bytes,
    random_state,
    release_memory,
    restore_random_state,
)
from edgetune.training.evaluate import Evaluation, chosen_rows, evaluate
from edgetune.training.layout import Layout, Padded
from edgetune.training.mixing import Mix
from edgetune.training.processes import World
from edgetune.training.schedule import Schedule
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks import Batch, Task

if TYPE_CHECKING:
    import torch


def count_steps(sequences: int, settings: TrainSettings) -> tuple[int, int]:
    """Optimizer steps in one epoch and in all."""
    per_epoch = math.ceil(math.ceil(sequences / settings.batch_size) / settings.grad_accum)
    return per_epoch, settings.steps or max(1, math.ceil(per_epoch * settings.epochs))


@dataclass
class Loop:
    """One run's loop over its steps."""

    adapted: Any
    """The model with its adapter."""
    task: Task
    optimizer: Any
    train: Sequence[TrainingSequence]
    valid: Sequence[TrainingSequence]
    """Empty when nothing is to be evaluated."""
    settings: TrainSettings
    device: torch.device
    sink: Sink
    save: Callable[[Position], None]
    """Called where a checkpoint is due."""
    keep_best: Callable[[Position], None]
    """Called when the adapter is the best so far by the chosen metric."""
    should_stop: Callable[[], bool]
    """Asked after each step; when true, the loop saves and returns early."""
    position: Position = field(default_factory=Position)
    layout: Layout = None  # type: ignore[assignment]
    """How sequences become batches; by default padded."""
    dtype: torch.dtype | None = None
    """What is computed in; by default what the frozen weights are in."""
    world: World = field(default_factory=World)
    """The processes that take these steps together."""
    measured_before: Callable[[Evaluation | None], None] = lambda found: None
    """Called with what the model is worth before its first step, in the leading process."""
    mix: Mix = None  # type: ignore[assignment]
    """How often each training sequence comes; by default once an epoch."""
    rate: Callable[[int], float] | None = None
    """The learning rate of a step, from 0; by default the settings' schedule."""

    def __post_init__(self) -> None:
        self.layout = self.layout or Padded(self.task, self.device, self.settings.batch_size)
        self.layout.settle(self.position.settled)
        self.mix = self.mix or Mix.even(len(self.train))
        self.steps_per_epoch, self.total = count_steps(self.mix.size, self.settings)
        self.rate_of = self.rate or Schedule.of(self.settings, self.total).rate
        self.eval_every = self.settings.eval_every or self.steps_per_epoch
        self.save_every = self.settings.save_every or min(200, max(1, math.ceil(self.total / 10)))
        self.parameters = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def run(self) -> bool:
        """Take every step that is left; whether the run is finished (and not stopped)."""
        self.adapted.train()
        if self.position.step == 0:
            found = self.evaluate("valid_before")
            if self.world.leads:
                self.measured_before(found)
            if self.world.any(self.should_stop()):
                self._save()
                return False
        while self.position.step < self.total and not self._is_stale:
            self.take_step()
            step = self.position.step
            if step % self.eval_every == 0 or step == self.total:
                self.evaluate("valid")
                self.position.stale = int(self.world.numbers_of_leader(self.position.stale)[0])
            ending = step == self.total or self._is_stale
            stopping = self.world.any(self.should_stop()) and not ending
            if step % self.save_every == 0 or stopping or ending:
                self._save()
            if stopping:
                return False
        if self.position.step < self.total:
            metric, count = self.settings.metric or "loss", self.position.stale
            self.sink(Notice(f"Stopped at step {self.position.step}: {count} measurements without a better {metric}."))
        return True

    def _save(self) -> None:
        self.position.settled = self.layout.settled()
        if self.world.leads:
            self.save(self.position)

    def take_step(self) -> None:
        """One optimizer step. Raises `EdgetuneError` when the loss or the gradient is no longer a number."""
        started = time.perf_counter()
        step = self.position.step
        lr = self.rate_of(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("ratio", 1.0)
        chosen = [[self.train[index] for index in batch] for batch in self._step_batches(step)]
        self._scatter_dropout(step)
        batches, own_loss = self._backward_in_memory(self.world.share(chosen, divisible=self.task.divisible))
        self.world.sum_gradients(self.parameters)
        tokens, learned = sum(batch.tokens for batch in batches), sum(batch.learned_tokens for batch in batches)
        loss, *counts = self.world.sum(own_loss, tokens, learned)
        norm = self._clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise EdgetuneError(
                f"The {'gradient' if math.isfinite(loss) else 'loss'} is no longer a number at step {step + 1}.",
                hint=f"Start a new run with a lower learning rate, e.g. --lr {self.settings.lr / 4:g}.",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        taken = time.perf_counter() - started
        self._report(int(counts[0]), int(counts[1]), taken, {"loss": loss, "lr": lr, "grad_norm": norm})

    def _scatter_dropout(self, step: int) -> None:
        """Processes beside the leading one draw numbers of their own, as a function of the step."""
        if not self.world.leads:
            import torch

            torch.manual_seed((self.settings.seed + 1_000_003 * self.world.rank + 7_919 * step) % (1 << 63))

    def _step_batches(self, step: int) -> list[list[int]]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            lengths = [len(sequence.ids) for sequence in self.train]
            size, seed, chosen = self.settings.batch_size, self.settings.seed, self.mix.epoch(self.settings.seed, epoch)
            batches = epoch_batches(lengths, batch_size=size, seed=seed, epoch=epoch, chosen=chosen)
            self._epoch = (epoch, batches)
        return self._epoch[1][place * self.settings.grad_accum : (place + 1) * self.settings.grad_accum]

    def _backward_in_memory(self, parts: Sequence[Sequence[TrainingSequence]]) -> tuple[list[Batch], float]:
        """`_backward` of the step's sequences, in more and smaller passes when memory does not suffice."""
        denominator, random = 0.0, random_state(self.device)
        while True:
            try:
                batches = self.layout.batches(parts) if parts else []
                # Once a step: how sequences are laid out does not change it.
                denominator = denominator or self.world.sum(sum(batch.denominator for batch in batches))[0]
                missing = self.world.most(len(batches)) - len(batches) if self.world.splits else 0
                loss = self._backward(batches, denominator)
                self._keep_company(missing)
                return batches, loss
            except (RuntimeError, MemoryError) as error:
                # Processes that hold shares of the layers are in the middle of the pass: it cannot be tried again.
                if not is_out_of_memory(error) or self.world.splits or not (smaller := self.layout.shrink()):
                    raise
            # Out here the failed pass's tensors are no longer held by the error's traceback.
            self.optimizer.zero_grad(set_to_none=True)
            release_memory(self.device)
            # The second try drops out what the first one did: a run that had room for the first is no other run.
            restore_random_state(self.device, random)
            self.sink(Notice(f"Out of memory: going on with {smaller}; the step stays the same.", "warning"))

    def _backward(self, batches: Sequence[Batch], denominator: float) -> float:
        """Accumulate gradients of the summed loss over all `batches` by `denominator`; returns that loss."""
        total = 0.0
        for batch in batches:
            with self.autocast():
                loss = self.task.summed_loss(self.adapted, batch) / denominator
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _keep_company(self, passes: int) -> None:
        """Take `passes` that do not count, for processes that need this one's share of the layers for theirs."""
        for _ in range(passes):
            (batch,) = self.layout.batches([[self.train[0]]])
            with self.autocast():
                loss = self.task.summed_loss(self.adapted, batch) * 0.0
            loss.backward()  # type: ignore[no-untyped-call]

    def autocast(self) -> AbstractContextManager[Any]:
        """What the model computes in: with a bf16 base, the f32 adapter multiplies in bf16 as well."""
        import torch

        frozen = (parameter.dtype for parameter in self.adapted.parameters() if not parameter.requires_grad)
        if (self.dtype or next(frozen, torch.float32)) != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _clip(self) -> float:
        import torch

        limit = self.settings.max_grad_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def _report(self, tokens: int, learned: int, seconds: float, values: dict[str, float]) -> None:
        position = self.position
        position.step += 1
        position.tokens += tokens
        position.learned_tokens += learned
        position.seconds += seconds
        position.losses["train"] = values["loss"]
        measured = {
            **values,
            "epoch": position.step / self.steps_per_epoch,
            "tokens": float(position.tokens),
            "tokens_per_second": tokens / seconds,
            "memory_bytes": float(memory_bytes(self.device)),
        }
        self.sink(Metrics(position.step, measured))
        self.sink(Progress("train", position.step, self.total, "steps"))

    def evaluate(self, name: str) -> Evaluation | None:
        """Measure the validation rows and note it as `name`; keeps the adapter when it is the best so far."""
        rows = chosen_rows(self.valid, self.task.most_eval_rows)
        if not rows or not self.world.measures:
            return None
        found = evaluate(
            self.task,
            self.adapted,
            rows,
            batch_size=self.settings.batch_size,
            batches=lambda part: self.layout.batches([part]),
            autocast=self.autocast(),
            sink=self.sink,
            should_stop=self.should_stop if name == "valid_before" and not self.world.splits else lambda: False,
        )
        if found is None:
            return None
        position = self.position
        position.losses[name] = found.loss
        if found.measured.values:
            position.measures[name] = dict(found.measured.values)
        self.sink(Metrics(position.step, found.values, split="valid"))
        if name == "valid" and (self.settings.metric or self.settings.early_stopping):
            self._compare(found)
        return found

    def _compare(self, found: Evaluation) -> None:
        metric, position = self.settings.metric or "loss", self.position
        value = found.values[metric]
        before = position.best.get("value", math.nan)
        more_is_better = self.task.metrics.get(metric, False)
        better = not position.best or (value > before if more_is_better else value < before)
        if better and math.isfinite(value):
            position.best, position.stale = {"step": position.step, "value": value}, 0
            if self.world.leads:
                self.keep_best(position)
        else:
            position.stale += 1

    @property
    def _is_stale(self) -> bool:
        return 0 < self.settings.early_stopping <= self.position.stale
