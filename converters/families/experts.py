"""What mixtures of experts share: one GGUF tensor for all experts of a layer, from either layout on disk.

transformers saves each expert's matrices by themselves; a checkpoint may also hold them stacked, gate and up in one.
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.base import Target, Weight, weight
from converters.operations import RowSlice


def expert_weights(
    here: str, there: str, *, names: tuple[str, str, str], experts: int, inner: int, hidden: int
) -> Iterator[Weight]:
    """The experts under `here`, each with its own gate, up and down projection, called `names`."""
    for expert in range(experts):
        for name, kind, shape in zip(
            names, ("gate", "up", "down"), ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True
        ):
            yield weight(f"{here}.{expert}.{name}.weight", shape, f"{there}.ffn_{kind}_exps.weight", expert=expert)


def stacked_expert_weights(here: str, there: str, *, experts: int, inner: int, hidden: int) -> Iterator[Weight]:
    """The experts under `here` as two tensors over all of them, gate and up one above the other."""
    gate = Target(f"{there}.ffn_gate_exps.weight", (RowSlice(0, inner),))
    up = Target(f"{there}.ffn_up_exps.weight", (RowSlice(inner, 2 * inner),))
    yield Weight(f"{here}.gate_up_proj", (experts, 2 * inner, hidden), (gate, up))
    yield weight(f"{here}.down_proj", (experts, hidden, inner), f"{there}.ffn_down_exps.weight")
