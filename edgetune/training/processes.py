"""Several processes that train one adapter together, as `torchrun` and `accelerate launch` start them.

Each takes its share of every step's sequences; gradients and denominators are summed over all of them, so that a step
is the same step however many there are. The first process leads: it alone writes, measures and tells. Each holds the
whole model, or a share of its layers (`split`). Imports torch only where there are several.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edgetune.errors import EdgetuneError, UsageError

if TYPE_CHECKING:
    import torch

_BUCKET = 1 << 24
"""Numbers sent at once."""


def world_size() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def leads() -> bool:
    """Whether this process is the one that writes and tells."""
    return world_size() == 1 or int(os.environ.get("RANK") or 0) == 0


def local_index() -> int:
    """Which of this machine's processes this is, and so which of its GPUs it takes."""
    return int(os.environ.get("LOCAL_RANK") or 0) if world_size() > 1 else 0


def local_size() -> int:
    """How many of the processes share this machine's memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)) if world_size() > 1 else 1


def launcher_splits() -> bool:
    """Whether accelerate was told to split the model."""
    return world_size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class World:
    """All processes of a run; by default this one alone."""

    rank: int = 0
    size: int = 1
    device: Any = None
    """Where numbers are when they are sent."""
    splits: bool = False
    """Whether each holds a share of the layers only: then all run the model together, or none does."""

    @property
    def leads(self) -> bool:
        """Whether this process writes and tells."""
        return self.rank == 0

    @property
    def measures(self) -> bool:
        """Whether this process runs the model where that is measured, be it for the others' sake."""
        return self.leads or self.splits

    def share(self, parts: Sequence[Sequence[Any]], *, divisible: bool) -> list[Sequence[Any]]:
        """This process's sequences of a step's `parts`; whole parts where a part's sequences look at each other."""
        if self.size == 1:
            return list(parts)
        if not divisible:
            return list(parts[self.rank :: self.size])
        # A part comes sorted by length: every nth makes shares of about the same size.
        return [share for part in parts if (share := part[self.rank :: self.size])]

    def sum(self, *values: float) -> list[float]:
        """Each of `values`, summed over all processes."""
        if self.size == 1:
            return list(values)
        import torch

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._sum(tensor)
        return [float(value) for value in tensor]

    def any(self, holds: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum(float(holds))[0] > 0

    def most(self, count: int) -> int:
        """The largest `count` of all processes."""
        mine = [float(count) if rank == self.rank else 0.0 for rank in range(self.size)]
        return int(max(self.sum(*mine)))

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum every parameter's gradient; one that no process has stays None."""
        if self.size == 1:
            return
        import torch

        present = self.sum(*(float(parameter.grad is not None) for parameter in parameters))
        wanted = [parameter for parameter, count in zip(parameters, present, strict=True) if count]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(wanted):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients]).to(self.device)
            self._sum(flat)
            for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def copy_from_leader(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make `tensors` what they are in the leading process."""
        if self.size == 1:
            return
        import torch

        with torch.no_grad():
            for tensor in tensors:
                sent = tensor.detach().to(self.device).contiguous()
                self._checked(torch.distributed.broadcast, sent, src=0)
                tensor.copy_(sent)

    def numbers_of_leader(self, *values: float) -> list[float]:
        """The leading process's `values`."""
        return self.sum(*(value if self.leads else 0.0 for value in values))

    def text_of_leader(self, text: str) -> str:
        """The leading process's `text`."""
        if self.size == 1:
            return text
        import torch

        (length,) = self.numbers_of_leader(float(len(text.encode())))
        codes = torch.zeros(int(length), dtype=torch.uint8)
        if self.leads:
            codes.copy_(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))
        self.copy_from_leader([codes])
        return bytes(codes.tolist()).decode()

    def _sum(self, tensor: torch.Tensor) -> None:
        import torch

        self._checked(torch.distributed.all_reduce, tensor)

    def _checked(self, call: Any, *args: Any, **options: Any) -> None:
        try:
            call(*args, **options)
        except RuntimeError as error:
            raise process_lost() from error


def process_lost() -> EdgetuneError:
    """What there is to say when the others do not answer."""
    return EdgetuneError("Another process of this run stopped, or cannot be reached.", hint="Its own message says why.")


def is_process_lost(error: BaseException) -> bool:
    """Whether torch failed at exchanging numbers with other processes."""
    return world_size() > 1 and any(name in str(error) for name in ("gloo", "NCCL", "onnection closed by peer"))


@contextmanager
def join_processes(wanted_device: str, *, split: bool = False) -> Iterator[World]:
    """Meet the other processes that the launcher started, until the block ends; alone where there are none.

    `split`: each is to hold a share of the layers only; `accelerate launch --use_fsdp` says so too.
    """
    if world_size() == 1:
        yield World()
        return
    import torch

    from edgetune.training.device import choose_device

    device = choose_device(wanted_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # Others wait while the leading one measures and saves.
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"WORLD_SIZE is {world_size()}, but the processes do not find each other: {error}.",
            hint="Start them with torchrun or accelerate launch.",
        ) from error
    try:
        on = device if device.type == "cuda" else torch.device("cpu")
        yield World(
            torch.distributed.get_rank(), torch.distributed.get_world_size(), on, splits=split or launcher_splits()
        )
    finally:
        torch.distributed.destroy_process_group()


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(item.numel() for item in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
