"""A layout that keeps to the memory there is: gradient checkpointing first, then less in a pass.

Neither changes a step. What a run came to is told by `settled`, so that a resumed run begins there and not at the next
shortage of memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgetune.errors import UnsupportedError
from edgetune.training.layout import Layout
from edgetune.training.tasks.base import Batch


def can_checkpoint(model: Any) -> bool:
    """Whether the transformers model `model` can compute its layers again in the backward pass."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def start_checkpointing(model: Any) -> None:
    """Let `model` keep its layers' inputs alone from now on. Raises `UnsupportedError` when it cannot."""
    if not can_checkpoint(model):
        raise UnsupportedError(
            f"A {type(model).__name__} does not compute its layers again.", hint="Leave out --grad-checkpointing."
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Lean:
    """`layout`, whose `shrink` begins with the checkpointing of `model` where that is still `possible`."""

    def __init__(self, layout: Layout, model: Any, *, checkpointing: bool, possible: bool) -> None:
        self.layout, self.model, self.checkpointing = layout, model, False
        self.possible = possible and can_checkpoint(model)
        if checkpointing:
            self._checkpoint()

    def batches(self, parts: Sequence[Sequence[Any]]) -> list[Batch]:
        """As `layout` makes them."""
        return self.layout.batches(parts)

    def shrink(self) -> str:
        """Checkpointing, or what `layout` can do."""
        if self.checkpointing or not self.possible:
            return self.layout.shrink()
        self._checkpoint()
        return "gradient checkpointing"

    def settled(self) -> dict[str, int]:
        """Checkpointing, and what `layout` came to."""
        return {"checkpointing": int(self.checkpointing), **self.layout.settled()}

    def settle(self, values: Mapping[str, int]) -> None:
        """Go on as `settled` told."""
        if values.get("checkpointing") and not self.checkpointing:
            self._checkpoint()
        self.layout.settle(values)

    def _checkpoint(self) -> None:
        start_checkpointing(self.model)
        self.checkpointing = True
