"""A reply that is made step by step: it says when it has to be evaluated, and advances by itself when iterated over.

Whoever runs several at once (`together`, `in_step`) calls `step` and evaluates those that wait. Chooses nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator


class Stepped:
    """The iteration that every kind of reply shares."""

    is_waiting = False
    """Whether it has to be evaluated before the next step."""
    _steps: Generator[str | None, None, None]
    """Text as it comes; None where an evaluation is needed."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            if self.is_waiting:
                self._evaluate_alone()
            if (text := self.step()) is not None:
                return text

    def step(self) -> str | None:
        """More text, or None where it has to be evaluated first. Raises `StopIteration` at the end."""
        self.is_waiting = False
        text = next(self._steps)
        self.is_waiting = text is None
        return text

    def _evaluate_alone(self) -> None:
        raise NotImplementedError
