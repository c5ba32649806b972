"""The model's head applied to hidden states from inside the stack: what it would say if the stack ended there.

Known as the logit lens (nostalgebraist, 2020). The final norm and the head are read from the GGUF file and applied in
float32, piece by piece, so that no vocabulary-sized matrix is ever whole in memory. Which norm it is follows from the
file's own keys. `LensError` says when the lens cannot be trusted: its last layer must agree with llama.cpp's logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors

States = NDArray[np.float32]

_LARGEST_KL = 0.05
"""Nats that the lens may differ by from llama.cpp's own distribution, whose products are rounded."""

_MOST_SCORES = 1 << 23
"""Logits that are held at once: 32 MiB."""


class LensError(Exception):
    """Why hidden states of this model cannot be read as guesses."""


@dataclass(frozen=True)
class HeadAdapter:
    """A low-rank change of the head."""

    a: States
    """(rank, hidden)"""
    b: States
    """(vocabulary, rank), scaled"""


@dataclass(frozen=True)
class Heard:
    """What a head says after every block."""

    last: States
    """Logits of the last token: (blocks, vocabulary)."""
    best: NDArray[np.int64]
    """The likeliest token after each: (blocks, tokens)."""
    shares: States
    """How likely it is: (blocks, tokens)."""

    def check(self, logits: States) -> None:
        """Raise `LensError` unless the last block says what llama.cpp does, `logits` (vocabulary,)."""
        kl = divergence(logits[None], self.last[-1:])[0]
        if not kl <= _LARGEST_KL:
            raise LensError(f"the head applied to the last block differs from the model's own answer (KL {kl:.2g})")


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

    def read(self, states: States, count: int) -> Heard:
        """What the head says of `states` after every block (blocks, tokens, hidden), of the last `count` tokens.

        In one pass over the head, without keeping all logits. Raises `LensError` where it is not understood.
        """
        tokens = min(count, states.shape[1])
        normed = self.norm(states[:, -tokens:]).reshape(-1, states.shape[-1])
        vocabulary = self._tensors.shape(self.head)[0]
        # The rows of each block's last token, whose logits are kept.
        ends = np.arange(tokens - 1, len(normed), tokens)
        last = np.empty((len(ends), vocabulary), np.float32)
        best, highest = np.zeros(len(normed), np.int64), np.full(len(normed), -np.inf, np.float32)
        total = np.zeros(len(normed))
        inner = [normed @ adapter.a.T for adapter in self._adapters]
        bias = self._tensors.read("output.bias") if "output.bias" in self._tensors else None
        for start, rows in self._pieces(len(normed)):
            part = slice(start, start + len(rows))
            scores = normed @ rows.T
            for adapter, low in zip(self._adapters, inner, strict=True):
                scores += low @ adapter.b[part].T
            if bias is not None:
                scores += bias[part]
            scores = self._finish(scores)
            last[:, part] = scores[ends]
            places = scores.argmax(-1)
            found = scores[np.arange(len(scores)), places]
            better = found > highest
            best[better] = places[better] + start
            raised = np.maximum(highest, found)
            scores -= raised[:, None]
            total = total * np.exp(highest - raised) + np.exp(scores, out=scores).sum(-1)
            highest = raised
        shares = (1 / total).astype(np.float32)
        return Heard(last, best.reshape(len(ends), tokens), shares.reshape(len(ends), tokens))

    def _pieces(self, states: int) -> Iterator[tuple[int, States]]:
        """Rows of the head, few enough that their scores for so many states fit in `_MOST_SCORES`."""
        most = max(1, _MOST_SCORES // states)
        for start, rows in self._tensors.iter_rows(self.head):
            for at in range(0, len(rows), most):
                yield start + at, rows[at : at + most]

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
