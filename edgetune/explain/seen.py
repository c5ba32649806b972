"""What a llama.cpp graph computed for one text, put together from the tensors that `engine.tap` hands on.

A block's tensors carry its number. Where a graph gives the state after a block no name, as BERT's does, it is what
follows the block's last norm, or else what comes before the next block's first. Nothing here knows what is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.float32]
Maps = NDArray[np.float16]
"""Attention: (heads, tokens, tokens). There are many of them, and half the digits are enough to look at."""

_EMBEDDED = ("inp_norm-0", "inp_scaled", "inpL", "embd", "inp_embd")
"""What the first block gets, by the names that graphs have for it."""
_FINAL = ("result_norm", "result_embd_pooled", "result_embd", "norm")
"""States after the last block, the most finished first."""
_LAYERED = ("kq_soft_max", "ffn_inp", "sa_out", "cross_inp", "l_out")
_ADDED = ("kqv_out", "ffn_out")
"""What parts of a block add, which differs from the change they make where a norm follows."""
_MIDDLE_UNNAMED = ("phi3",)
"""Graphs that give the state between attention and MLP no name; it is the one after the block less "ffn_out"."""


@dataclass
class Seen:
    """The tensors of one text; its tokens may come in pieces."""

    length: int = 0
    """Tokens of the text."""
    architecture: str = ""
    """The GGUF file's."""
    has_unnamed: bool = False
    """Whether the states after blocks have no names; costs a look at every tensor."""
    has_source: bool = False
    """Whether blocks look at another text as well."""
    is_listening: bool = True
    pieces: dict[str, list[Any]] = field(default_factory=dict)
    """What was taken by name: float32, and attention in float16."""
    _latest: States | None = None
    _normed: int | None = None
    """The block whose norm awaits its bias."""
    _begun: int = -1

    @classmethod
    def of(cls, embedded: States | None, after: Sequence[States]) -> Seen:
        """A text's states where they are known without a graph: what the first block got, and after each block."""
        seen = cls(len(after[-1]) if after else 0)
        named = {f"l_out-{layer}": [state] for layer, state in enumerate(after)}
        seen.pieces = named if embedded is None else {"inpL": [embedded], **named}
        return seen

    def wants(self, name: str) -> bool:
        """Whether `take` is to have the tensor `name`."""
        return self.is_listening and (self.has_unnamed or self._is_known(name))

    def take(self, name: str, values: States) -> None:
        """Remember what is needed of it; its axes are ggml's from the last to the first."""
        if self.has_unnamed:
            self._follow(name, values)
        if self._is_known(name) or (self.has_unnamed and name.partition("-")[0] in _ADDED):
            # (1, 1, tokens, hidden), or (1, heads, tokens, keys) of attention, among them places that are still free
            is_map = name.startswith("kq_soft_max")
            keys = None if self.has_source else self.length
            kept = values[0, :, :, :keys].astype(np.float16) if is_map else values[0, 0].copy()
            self.pieces.setdefault(name, []).append(kept)

    def _follow(self, name: str, values: States) -> None:
        kind, _, number = name.partition("-")
        if (number.isdigit() and int(number) > self._begun) or name == "norm":
            if self._begun >= 0 and self._latest is not None:
                self.pieces.setdefault(f"after-{self._begun}", [self._latest.copy()])
            self._begun = int(number) if number else self._begun
        if self._normed is not None:
            self.pieces[f"after-{self._normed}"] = [values[0, 0].copy()]
        self._normed = int(number) if kind == "norm_w" and number.isdigit() else None
        if values.shape[:2] == (1, 1):
            self._latest = values[0, 0]

    @property
    def layers(self) -> int:
        """How many blocks there were."""
        numbers = (name.partition("-")[2] for name in self.pieces)
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)

    def clear(self, length: int) -> None:
        """Begin with another text of so many tokens, and listen."""
        self.length, self.pieces, self.is_listening = length, {}, True
        self._latest, self._normed, self._begun = None, None, -1

    def states(self, *names: str) -> States | None:
        """(tokens, hidden) of the first of `names` that the graph has; None when it has none."""
        for name in names:
            pieces: list[States] = self.pieces.get(name, [])
            if pieces and sum(map(len, pieces)) == self.length:
                return np.concatenate(pieces)
        return None

    def last(self, name: str) -> States | None:
        """(tokens, hidden) of the last tensor called `name`, of a text that came in one piece."""
        pieces: list[States] | None = self.pieces.get(name)
        return pieces[-1] if pieces and len(pieces[-1]) == self.length else None

    def after(self, layer: int) -> States | None:
        """The state after a block, (tokens, hidden)."""
        found = self.states(f"l_out-{layer}", f"after-{layer}")
        # T5's graph calls the last one by another name.
        return self.states("result_embd") if found is None and layer == self.layers - 1 else found

    def between(self, layer: int) -> States | None:
        """The state after a block's attention and before its MLP, (tokens, hidden)."""
        found = self.states(f"ffn_inp-{layer}", f"sa_out-{layer}")
        if found is None and self.architecture in _MIDDLE_UNNAMED:
            after, added = self.after(layer), self.states(f"ffn_out-{layer}")
            found = after - added if after is not None and added is not None else None
        return found

    def embedded(self) -> States | None:
        """What the first block gets, (tokens, hidden)."""
        return self.states(*_EMBEDDED)

    def final(self) -> States | None:
        """The last state there is, (tokens, hidden)."""
        return self.states(*_FINAL)

    def take_attention(self, layer: int) -> Maps | None:
        """(heads, tokens, tokens), which are then no longer kept here."""
        pieces = self.pieces.pop(f"kq_soft_max-{layer}", None)
        if not pieces:
            return None
        wide = [np.pad(piece, ((0, 0), (0, 0), (0, self.length - piece.shape[-1]))) for piece in pieces]
        return np.concatenate(wide, axis=1)

    def _is_known(self, name: str) -> bool:
        kind, _, layer = name.partition("-")
        layered = (*_LAYERED, "ffn_out") if self.architecture in _MIDDLE_UNNAMED else _LAYERED
        return name in _EMBEDDED or name in _FINAL or bool(layer.isdigit() and kind in layered)


def share(before: States | None, added: States | None) -> float | None:
    """How long what was added is, as a share of what it was added to; the mean over tokens."""
    if before is None or added is None:
        return None
    lengths = np.linalg.norm(before, axis=-1)
    return float((np.linalg.norm(added, axis=-1) / np.maximum(lengths, 1e-12)).mean())
