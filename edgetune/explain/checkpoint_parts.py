"""What the parts of a transformers block add to the state that runs through it, found while the block computes.

The state is followed from the block's input to its output through additions, and through norms that the block goes on
from: whatever is added on that way was made by attention, by attention to a source, or by the rest, the feed-forward
part. That holds for blocks with norms before their parts, after them, or around them, for parts side by side, and under
any adapter. A block whose output is not reached so, or to which other parts add something, has no shares at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgetune.explain.parts import Added

if TYPE_CHECKING:
    import torch

Maker = Literal["attention", "cross", "mlp"]
"""Who made something that is added."""

_CROSS = re.compile(r"cross_?att|encoder_attn|EncDecAttention", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_ADDITIONS = ("add", "add_")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_grouped_mm", "convolution")
_SAME = (
    "view",
    "_unsafe_view",
    "reshape",
    "clone",
    "alias",
    "detach",
    "to",
    "_to_copy",
    "dropout",
    "contiguous",
    "squeeze",
    "unsqueeze",
)
"""Operations that hand on what they get."""


@dataclass(frozen=True)
class _State:
    """A tensor that is the state: what was added to it since the block began, as (who, share)."""

    added: tuple[tuple[Maker, float], ...] = ()
    is_normed: bool = False


_Lengths = dict[Maker, "torch.Tensor | None"]
"""Who made the summands of a tensor, and their lengths (tokens,) where it is a sum of several; empty: nobody knows."""


class Watch:
    """Watches `blocks` while a model runs; `added` has an entry for each that ran."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._blocks = list(blocks)
        self.added: list[Added | None] = []
        self._known: dict[int, tuple[Any, _State | _Lengths]] = {}
        """By a tensor's identity, which it keeps as long as it is held here."""
        self._inside: list[Maker] = []
        self._is_open = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch what runs within."""
        from torch.utils._python_dispatch import TorchDispatchMode

        watch = self

        class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                if not watch._is_open:
                    return func(*args, **(kwargs or {}))
                name = func.overloadpacket.__name__
                made = watch._before(name, args, kwargs or {})
                result = func(*args, **(kwargs or {}))
                if made is not None and not (any(result is one for one in args) and not name.endswith("_")):
                    watch._remember(result, made)
                return result

        self.added = []
        with ExitStack() as hooks, Follow():  # type: ignore[no-untyped-call]
            for block in self._blocks:
                hooks.callback(block.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(self._end).remove)
                for maker, module in attention_modules(block):
                    hooks.callback(module.register_forward_pre_hook(lambda *_, m=maker: self._inside.append(m)).remove)
                    hooks.callback(module.register_forward_hook(lambda *_: self._leave()).remove)
                for module in _norms(block):
                    hooks.callback(module.register_forward_hook(self._norm).remove)
            yield

    def _begin(self, _block: Any, inputs: tuple[Any, ...], known: dict[str, Any]) -> None:
        state = inputs[0] if inputs else known["hidden_states"]
        self._known, self._inside, self._is_open = {id(state): (state, _State())}, [], True

    def _end(self, _block: Any, _inputs: Any, output: Any) -> None:
        self._is_open = False
        parts = output if isinstance(output, tuple) else (output,)
        found = next((self._of(one) for one in parts if getattr(one, "ndim", 0) == 3), None)
        self.added.append(_summary(found) if isinstance(found, _State) else None)
        self._known = {}

    def _leave(self) -> None:
        self._inside.pop()

    def _norm(self, _module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """A norm hands on who made what it gets; its own steps say nothing."""
        found = self._of(inputs[0]) if inputs and self._is_open else None
        if isinstance(found, _State):
            self._remember(output, _State(found.added, is_normed=True))
        elif found is not None:
            self._remember(output, _single(found))

    def _of(self, value: Any) -> _State | _Lengths | None:
        found = self._known.get(id(value))
        return found[1] if found is not None else None

    def _remember(self, result: Any, made: _State | _Lengths) -> None:
        for one in result if isinstance(result, tuple | list) else (result,):
            self._known[id(one)] = (one, made)

    def _before(self, name: str, args: tuple[Any, ...], known: dict[str, Any]) -> _State | _Lengths | None:
        """What is known of the result of an operation, from what it gets: that may be gone after it."""
        tensors = [one for one in _flat(args) if hasattr(one, "data_ptr")]
        found = [made for one in tensors if (made := self._of(one)) is not None]
        if name in _SAME:
            return found[0] if found else None
        if name in _ADDITIONS and len(tensors) == 2 and not known:
            return self._sum(tensors[0], tensors[1])
        if not found:
            return None
        if self._inside:
            return {self._inside[-1]: None}
        makers: _Lengths = {maker: None for one in found if not isinstance(one, _State) for maker in one}
        return {"mlp": None} if not makers and name in _PRODUCTS else _single(makers)

    def _sum(self, first: torch.Tensor, second: torch.Tensor) -> _State | _Lengths | None:
        one, other = self._of(first), self._of(second)
        if one is None and other is None:
            return None
        if isinstance(one, _State) and isinstance(other, _State):
            return {}
        if isinstance(other, _State):
            first, second, one, other = second, first, other, one
        if isinstance(one, _State):
            if not isinstance(other, dict) or not other or first.shape != second.shape:
                return {}
            whole = _lengths(first).clamp_min(1e-12)
            shares = tuple((maker, float((own / whole).mean())) for maker, own in _made(second, other).items())
            return _State((*one.added, *shares))
        assert not isinstance(other, _State)
        if self._inside:
            return {self._inside[-1]: None}
        if one is None or other is None:
            return _single(one or other or {})  # A constant is added, as a bias is.
        if not one or not other:
            return {}
        if set(one) & set(other):
            return _single({**one, **other})
        return {**_made(first, one), **_made(second, other)}


def _single(makers: _Lengths) -> _Lengths:
    """What becomes of a tensor by another step: who made it is told only where that is one."""
    return dict.fromkeys(makers) if len(makers) == 1 else {}


def _made(tensor: torch.Tensor, makers: _Lengths) -> dict[Maker, torch.Tensor]:
    return {maker: known if known is not None else _lengths(tensor) for maker, known in makers.items()}


def _lengths(states: torch.Tensor) -> torch.Tensor:
    """(…, tokens, hidden) → (tokens,)"""
    lengths: torch.Tensor = states.detach().float().norm(dim=-1)
    return lengths.flatten()


def _summary(state: _State) -> Added | None:
    makers = [maker for maker, _ in state.added]
    if sorted(makers) not in (["attention", "mlp"], ["attention", "cross", "mlp"]):
        return None
    return Added(**dict(state.added), is_normed=state.is_normed)


def attention_modules(block: Any) -> Iterator[tuple[Maker, Any]]:
    """The outermost modules of `block` that are attention, to its own tokens or ("cross") to a source."""
    taken: list[str] = []
    for name, module in block.named_modules():
        last = name.rpartition(".")[2]
        if not name or _is_norm(module) or any(name.startswith(f"{one}.") for one in taken):
            continue
        if maker := "cross" if _CROSS.search(last) else "attention" if _ATTENTION.search(last) else None:
            taken.append(name)
            yield maker, module  # type: ignore[misc]


def _norms(block: Any) -> Iterator[Any]:
    return (module for module in block.modules() if _is_norm(module))


def _is_norm(module: Any) -> bool:
    return "norm" in type(module).__name__.lower()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value
