"""How the sequences of an optimizer step become forward passes: padded side by side, or packed in rows.

Which sequences make up a step, and so its loss, is none of a layout's business. A layout can be told to take less
memory a pass; the step then has more passes and stays the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgetune.training.packing import pack
from edgetune.training.tasks.base import Batch, Task

if TYPE_CHECKING:
    import torch


class Layout(Protocol):
    """One way to lay out sequences."""

    def batches(self, parts: Sequence[Sequence[Any]]) -> list[Batch]:
        """The forward passes of one step, whose sequences come in `parts` of the batch size."""
        ...

    def shrink(self) -> str:
        """Take about half the memory a pass from now on; what that means, or "" when a pass is as small as can be."""
        ...

    def settled(self) -> dict[str, int]:
        """What `shrink` has come to, for a resumed run."""
        ...

    def settle(self, values: Mapping[str, int]) -> None:
        """Go on as another run's `settled` told; what is not this layout's is left alone."""
        ...


@dataclass
class Padded:
    """Every part is one pass, its sequences side by side; after `shrink`, several passes."""

    task: Task
    device: torch.device
    size: int
    """Most sequences in a pass."""

    def batches(self, parts: Sequence[Sequence[Any]]) -> list[Batch]:
        """As the task makes them."""
        return [
            self.task.collate(part[at : at + self.size], self.device)
            for part in parts
            for at in range(0, len(part), self.size)
        ]

    def shrink(self) -> str:
        """Half as many sequences."""
        if self.size == 1 or not self.task.divisible:
            return ""
        self.size = (self.size + 1) // 2
        return f"{self.size} sequence{'s' if self.size > 1 else ''} in a pass"

    def settled(self) -> dict[str, int]:
        """How many sequences."""
        return {"sequences": self.size}

    def settle(self, values: Mapping[str, int]) -> None:
        """No more sequences than that."""
        self.size = min(self.size, values.get("sequences", self.size))


@dataclass
class Packed:
    """Rows of tokens without padding; which part a sequence came in does not matter."""

    capacity: int
    """Most tokens in a row."""
    longest: int
    """The longest sequence: no row can be smaller."""
    device: torch.device

    def batches(self, parts: Sequence[Sequence[Any]]) -> list[Batch]:
        """Rows by best fit."""
        return [*pack([sequence for part in parts for sequence in part], self.capacity, self.device)]

    def shrink(self) -> str:
        """Rows half as long."""
        if self.capacity <= self.longest:
            return ""
        self.capacity = max(self.longest, self.capacity // 2)
        return f"rows of {self.capacity} tokens"

    def settled(self) -> dict[str, int]:
        """Tokens in a row."""
        return {"row_tokens": self.capacity}

    def settle(self, values: Mapping[str, int]) -> None:
        """No longer rows than that."""
        self.capacity = min(self.capacity, values.get("row_tokens", self.capacity))
