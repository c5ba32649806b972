"""In which order a torch model computes, and what its norms are for: its modules stand in the order of its source.

Seen by hooks while it works. What a weight is called, and what it is for by its name, is `checkpoint_anatomy`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from edgetune.explain.page import Part

Order = Mapping[Any, int]
"""Module → its place among those that worked."""

_NORMS = ("norm", "norm of cross attention")
_GROUPS = {"attention": "attention", "cross attention": "cross attention", "MLP": "the MLP", "experts": "the MLP"}


@contextmanager
def watched(model: Any) -> Iterator[Order]:
    """The order in which modules of `model` begin to work meanwhile, each by its first time."""
    order: dict[Any, int] = {}

    def note(module: Any, _inputs: object) -> None:
        order.setdefault(module, len(order))

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()


def place(module: Any, name: str, order: Order) -> int:
    """Of the parameter `name` of `module`: when it worked, or else the nearest module around it; last if none did."""
    found, owner = order.get(module), module
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
        found = order.get(owner, found)
    return len(order) if found is None else found


def with_norms(parts: Sequence[Part]) -> list[Part]:
    """A block's `parts`, in order, with what each norm stands before or after.

    A norm ends each group where one ends the block and none begins it, as in BERT; elsewhere it begins one, and is the
    first of two in a row an end all the same, as in Gemma.
    """
    groups = [_group(part) for part in parts]
    known = [group for group in groups if group]
    follow = bool(groups) and groups[-1] == "" and groups[0] != ""
    told, last = [], ""
    for index, (part, group) in enumerate(zip(parts, groups, strict=True)):
        last = group or last
        if group or not known:
            told.append(part)
            continue
        coming = next((one for one in groups[index + 1 :] if one), "")
        is_end = follow or not coming or any(_is_other(part, one) for one in _norms_behind(parts, groups, index))
        what = f"norm after {last}" if is_end and last else f"norm before {coming}"
        told.append(replace(part, role=what + (" (bias)" if part.role.endswith("(bias)") else "")))
    return told


def _norms_behind(parts: Sequence[Part], groups: Sequence[str], index: int) -> Iterator[Part]:
    """The norms that follow the one at `index` with nothing between them."""
    for part, group in zip(parts[index + 1 :], groups[index + 1 :], strict=True):
        if group:
            return
        yield part


def _is_other(part: Part, other: Part) -> bool:
    """Whether two parameters are of two modules."""
    return part.name.rpartition(".")[0] != other.name.rpartition(".")[0]


def _group(part: Part) -> str:
    """What of a block a weight belongs to; empty for a norm, its own name for what is neither."""
    role = part.role.removesuffix(" (bias)")
    return "" if role in _NORMS else _GROUPS.get(role.partition(":")[0], role)
