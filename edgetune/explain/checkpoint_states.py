"""The states between the blocks of a transformers model, and the model as it would be if its blocks ended earlier.

What a block gave is kept while the model runs. To hear what the model would say after one of them, it runs again with
every block passed over: each hands on what that one gave, so that the model's own last norm, pooling and head follow,
whatever they are. Knows nothing of tokens or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.explain.checkpoint_parts import Watch, attention_modules
from edgetune.explain.parts import Added
from edgetune.explain.seen import Maps

States = NDArray[np.float32]
Heard = TypeVar("Heard")


class BlockStates:
    """Blocks of one stack, watched."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        """`blocks` are modules that take and give hidden states, (1, tokens, hidden), in a tuple or by themselves."""
        self._blocks = list(blocks)
        self._watch = Watch(blocks)
        self._given: list[Any] = []
        self._first: Any = None
        self._maps: dict[str, list[Maps]] = {"attention": [], "cross": []}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What the blocks give within is kept; each may run once."""
        self._given, self._first, self._maps = [], None, {"attention": [], "cross": []}

        def keep(_module: Any, inputs: tuple[Any, ...], known: dict[str, Any], output: Any) -> None:
            if self._first is None:
                self._first = inputs[0] if inputs else known["hidden_states"]
            self._given.append(output)

        with ExitStack() as hooks:
            hooks.enter_context(self._watch.on())
            for block in self._blocks:
                hooks.callback(block.register_forward_hook(keep, with_kwargs=True).remove)
                for maker, module in attention_modules(block):
                    hooks.callback(module.register_forward_hook(partial(self._look, maker)).remove)
            yield

    def _look(self, maker: str, _module: Any, _inputs: Any, output: Any) -> None:
        """Keep the map that a module of attention gives beside its states, in half the room."""
        parts = reversed(output) if isinstance(output, tuple) else ()
        weights = next((one for one in parts if getattr(one, "ndim", 0) == 4 and _are_shares(one)), None)
        if weights is not None:
            self._maps[maker].append(weights[0].half().numpy())

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

    @property
    def count(self) -> int:
        """Blocks that ran."""
        return len(self._given)

    def heard(self, run: Callable[[], Heard]) -> Iterator[Heard]:
        """What `run` gives if the model ends after each block, one after the other, the last one included."""
        for output in self._given:
            with ExitStack() as patches:
                for block in self._blocks:
                    patches.enter_context(_instead(block, output))
                found = run()
            yield found

    @property
    def attention(self) -> list[Maps | None]:
        """Where each block looked, (heads, tokens, tokens); None where the model does not tell."""
        return self._told("attention")

    @property
    def cross_attention(self) -> list[Maps | None]:
        """Where each block looked in the source, (heads, tokens, source tokens)."""
        return self._told("cross")

    def _told(self, maker: str) -> list[Maps | None]:
        found = self._maps[maker]
        return [*found] if len(found) == self.count else [None] * self.count


def watch(stacks: Sequence[BlockStates], run: Callable[..., Heard]) -> Heard:
    """What `run` gives while the blocks of all `stacks` are watched.

    It runs again for a model that gives its attention only when it is asked to, by `output_attentions`.
    """
    asked: dict[str, bool] = {}
    while True:
        with ExitStack() as watching:
            for stack in stacks:
                watching.enter_context(stack.kept())
            found = run(**asked)
        if asked or all(one is not None for stack in stacks for one in stack.attention):
            return found
        asked = {"output_attentions": True}


def _are_shares(weights: Any) -> bool:
    """Whether these are shares of one, and no bias by distance or keys of a cache."""
    return bool((weights >= 0).all()) and bool((weights.sum(-1) <= 1.001).all()) and bool(weights.any())


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
