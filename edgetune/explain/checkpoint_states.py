"""The states between the blocks of a transformers model, and the model as it would be if its blocks ended earlier.

What a block gave is kept while the model runs. To hear what the model would say after one of them, it runs again with
every block passed over: each hands on what that one gave, so that the model's own last norm, pooling and head follow,
whatever they are. Knows nothing of tokens or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.checkpoint_parts import Watch
from edgetune.explain.parts import Added

States = NDArray[np.float32]


class BlockStates:
    """Blocks of one stack, watched."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        """`blocks` are modules that take and give hidden states, (1, tokens, hidden), in a tuple or by themselves."""
        self._blocks = list(blocks)
        self._watch = Watch(blocks)
        self._given: list[Any] = []
        self._first: Any = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What the blocks give within is kept; each may run once."""
        self._given, self._first = [], None

        def keep(_module: Any, inputs: tuple[Any, ...], known: dict[str, Any], output: Any) -> None:
            if self._first is None:
                self._first = inputs[0] if inputs else known["hidden_states"]
            self._given.append(output)

        with ExitStack() as hooks:
            hooks.enter_context(self._watch.on())
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
            yield

    @property
    def embedded(self) -> States | None:
        """What the first block got, (tokens, hidden); None where nothing ran."""
        return None if self._first is None else _numbers(self._first)

    @property
    def after(self) -> list[States]:
        """The state after each block, (tokens, hidden)."""
        return [_numbers(_state(output)) for output in self._given]

    @property
    def added(self) -> list[Added | None]:
        """What the parts of each block added; None of one whose parts are not known."""
        return self._watch.added

    def heard(self, run: Callable[[], States]) -> list[States]:
        """What `run` gives if the model ends after each block, the last one included."""
        found = []
        for output in self._given:
            with ExitStack() as patches:
                for block in self._blocks:
                    patches.enter_context(_instead(block, output))
                found.append(run())
        return found


@contextmanager
def _instead(block: Any, output: Any) -> Iterator[None]:
    """Let `block` give `output`, whatever it gets."""
    block.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del block.forward


def _state(output: Any) -> Any:
    """The hidden states in what a block gave; attention weights have one axis more."""
    parts = output if isinstance(output, tuple) else (output,)
    return next(part for part in parts if getattr(part, "ndim", 0) == 3)


def _numbers(states: Any) -> States:
    result: States = states[0].float().cpu().numpy()
    return result
