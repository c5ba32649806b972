"""The model's head applied to hidden states from inside the stack: what it would say if the stack ended there.

Known as the logit lens (nostalgebraist, 2020). The final norm and the head are read from the GGUF file and applied in
float32, piece by piece, so that no vocabulary-sized matrix is ever whole in memory. Which norm it is follows from the
file's own keys. `LensError` says when the lens cannot be trusted: its last layer must agree with llama.cpp's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors

States = NDArray[np.float32]

_LARGEST_KL = 0.05
"""Nats that the lens may differ by from llama.cpp's own distribution, whose products are rounded."""


class LensError(Exception):
    """Why hidden states of this model cannot be read as guesses."""


@dataclass(frozen=True)
class HeadAdapter:
    """A low-rank change of the head."""

    a: States
    """(rank, hidden)"""
    b: States
    """(vocabulary, rank), scaled"""


class Lens:
    """Final norm and head of one GGUF file."""

    def __init__(
        self, header: GgufHeader, adapters: Sequence[tuple[Path, float]] = (), *, norm: str = "output_norm"
    ) -> None:
        """`norm` is what the norm before the head is called.

        Raises `LensError` when the file has no head that is understood here.
        """
        self._norm = norm
        self._tensors = GgufTensors(header)
        self._metadata, self._prefix = header.metadata, header.architecture
        self.head = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        """The tensor that turns hidden states into logits."""
        if self.head not in self._tensors or f"{norm}.weight" not in self._tensors:
            raise LensError("its head is not laid out as expected")
        self._adapters = [one for path, scale in adapters if (one := _head_adapter(path, self.head, scale))]

    def norm(self, states: States) -> States:
        """`states` (…, hidden) after the final norm."""
        weight = self._tensors.read(f"{self._norm}.weight")
        rms, plain = self._number("attention.layer_norm_rms_epsilon"), self._number("attention.layer_norm_epsilon")
        wide = states.astype(np.float64)
        if rms is None and plain is None:
            raise LensError("the file does not say which norm it ends with")
        if rms is None:
            wide = wide - wide.mean(-1, keepdims=True)
        scale = np.sqrt((wide * wide).mean(-1, keepdims=True) + (rms if rms is not None else plain))
        result: States = (wide / scale).astype(np.float32) * weight
        bias = f"{self._norm}.bias"
        return result + self._tensors.read(bias) if bias in self._tensors else result

    def logits(self, states: States) -> States:
        """Logits of hidden `states` (rows, hidden) as they leave a block: (rows, vocabulary)."""
        normed = self.norm(states)
        result = np.empty((len(states), self._tensors.shape(self.head)[0]), np.float32)
        for start, rows in self._tensors.iter_rows(self.head):
            result[:, start : start + len(rows)] = normed @ rows.T
        for adapter in self._adapters:
            result += (normed @ adapter.a.T) @ adapter.b.T
        if "output.bias" in self._tensors:
            result += self._tensors.read("output.bias")
        return self._finish(result)

    def best(self, states: States) -> tuple[NDArray[np.int64], States]:
        """The most likely token for each of `states` (rows, hidden), and its probability, without keeping all logits.

        Both are (rows,).
        """
        if self._adapters or "output.bias" in self._tensors:
            return likeliest(self.logits(states))
        normed = self.norm(states)
        best = np.zeros(len(states), np.int64)
        highest, total = np.full(len(states), -np.inf), np.zeros(len(states))
        for start, rows in self._tensors.iter_rows(self.head):
            scores = self._finish(normed @ rows.T).astype(np.float64)
            places = scores.argmax(-1)
            found = scores[np.arange(len(states)), places]
            better = found > highest
            best[better] = places[better] + start
            raised = np.maximum(highest, found)
            total = total * np.exp(highest - raised) + np.exp(scores - raised[:, None]).sum(-1)
            highest = raised
        return best, (1 / total).astype(np.float32)

    def check(self, states: States, logits: States) -> None:
        """Raise `LensError` unless the last block's `states` give llama.cpp's own `logits` (rows, vocabulary)."""
        kl = divergence(logits, self.logits(states)).max()
        if not kl <= _LARGEST_KL:
            raise LensError(f"the head applied to the last block differs from the model's own answer (KL {kl:.2g})")

    def _finish(self, logits: States) -> States:
        if scale := self._number("logit_scale"):
            logits = logits / scale if self._prefix.startswith("granite") else logits * scale
        if cap := self._number("final_logit_softcapping"):
            logits = np.tanh(logits / cap) * cap
        return logits

    def _number(self, key: str) -> float | None:
        value = self._metadata.get(f"{self._prefix}.{key}")
        return float(value) if isinstance(value, int | float) else None


def divergence(reference: States, other: States) -> NDArray[np.float64]:
    """KL(reference ‖ other) of each row of logits (rows, vocabulary), in nats: (rows,)."""
    first, second = _log_softmax(reference), _log_softmax(other)
    result: NDArray[np.float64] = (np.exp(first) * (first - second)).sum(-1)
    return result


def likeliest(logits: States) -> tuple[NDArray[np.int64], States]:
    """The best of each row of logits (rows, vocabulary) and its probability: (rows,) each."""
    best: NDArray[np.int64] = logits.argmax(-1)
    return best, np.exp(_log_softmax(logits).max(-1)).astype(np.float32)


def _log_softmax(logits: States) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return result


def _head_adapter(path: Path, head: str, scale: float) -> HeadAdapter | None:
    header = read_gguf_header(path)
    tensors = GgufTensors(header)
    if f"{head}.lora_a" not in tensors:
        return None
    a, b = tensors.read(f"{head}.lora_a"), tensors.read(f"{head}.lora_b")
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    # llama.cpp scales by alpha / rank, and not at all when alpha is 0.
    share = float(alpha) / len(a) if isinstance(alpha, int | float) and alpha else 1.0
    return HeadAdapter(a, b * np.float32(scale * share))
