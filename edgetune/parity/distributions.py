"""Next-token distributions of torch and llama.cpp over the same ids, compared position by position.

torch is the reference: the checkpoint in float32, with PEFT's own adapter. llama.cpp runs on the CPU with a float32 KV
cache and without flash attention, so that what differs is the file. Chooses no bound; see `bounds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.events import Progress, Sink

_ROWS = 128
"""Positions compared at once; bounds the float64 working memory."""


@dataclass
class Comparison:
    """Sums over compared positions."""

    positions: int = 0
    kl_sum: float = 0.0
    max_kl: float = 0.0
    same_top: int = 0
    worst: str = field(default="")
    """Where the largest KL was, and both sides' choice there."""

    @property
    def mean_kl(self) -> float:
        """Nats a position; NaN when nothing was compared."""
        return self.kl_sum / self.positions if self.positions else float("nan")

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token."""
        return self.same_top / self.positions if self.positions else float("nan")

    def add(self, expected: NDArray[np.float32], found: NDArray[np.float32], *, where: str = "") -> None:
        """Add positions: logits of shape (positions, vocabulary); the larger vocabulary's padding is cut off."""
        width = min(expected.shape[1], found.shape[1])
        for start in range(0, len(expected), _ROWS):
            p, q = (_log_softmax(side[start : start + _ROWS, :width]) for side in (expected, found))
            kl = (np.exp(p) * (p - q)).sum(axis=1)
            tops = p.argmax(axis=1), q.argmax(axis=1)
            worst = int(np.nanargmax(kl)) if not np.isnan(kl).all() else 0
            # NaN must stay: it is what a file with broken numbers gives.
            if np.isnan(kl).any() or kl[worst] > self.max_kl:
                self.max_kl = float("nan") if np.isnan(kl).any() else float(kl[worst])
                self.worst = f"{where} position {start + worst}: token {tops[1][worst]} instead of {tops[0][worst]}"
            self.kl_sum += float(kl.sum())
            self.same_top += int((tops[0] == tops[1]).sum())
            self.positions += len(kl)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values


def compare(expected: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]]) -> Comparison:
    """Compare two lists of logits, one entry a sequence."""
    result = Comparison()
    for number, (mine, theirs) in enumerate(zip(expected, found, strict=True)):
        result.add(mine, theirs, where=f"sequence {number},")
    return result


def chance_kl(logits: Sequence[NDArray[np.float32]]) -> float:
    """Mean KL of distributions that have nothing to do with each other: each position's against a distant one's."""
    return compare(logits, [np.roll(rows, len(rows) // 2, axis=0) for rows in logits]).mean_kl


def effect_ratio(
    plain: Sequence[NDArray[np.float32]],
    adapted: Sequence[NDArray[np.float32]],
    plain_found: Sequence[NDArray[np.float32]],
    adapted_found: Sequence[NDArray[np.float32]],
) -> float | None:
    """How large the adapter's change of the logits is, along torch's change and relative to it; None without a change.

    The base's own rounding error is in both of llama.cpp's terms and largely cancels.
    """
    along = total = 0.0
    for p, a, q, b in zip(plain, adapted, plain_found, adapted_found, strict=True):
        width = min(p.shape[1], q.shape[1])
        expected, found = (_centred(late[:, :width] - early[:, :width]) for early, late in ((p, a), (q, b)))
        along += float((expected * found).sum(dtype=np.float64))
        total += float((expected * expected).sum(dtype=np.float64))
    positions = sum(len(rows) for rows in plain)
    return along / total if total > 1e-6 * positions else None


def _centred(change: NDArray[np.float32]) -> NDArray[np.float32]:
    change -= change.mean(axis=1, keepdims=True)
    return change


def llama_logits(
    gguf_path: Path,
    sequences: Sequence[Sequence[int]],
    *,
    lora_path: Path | None = None,
    long_from: int = 0,
    sink: Sink,
) -> list[NDArray[np.float32]]:
    """Logits of llama.cpp for every sequence, each (tokens, vocabulary).

    Sequences longer than `long_from` get a context of their own: llama.cpp chooses some rope factors by the context's
    size, Hugging Face by the text's.
    """
    lora = [LoraSpec(lora_path)] if lora_path else []
    results: dict[int, NDArray[np.float32]] = {}
    total = sum(map(len, sequences))
    for group in _groups(sequences, long_from):
        engine = LlamaEngine.open(
            gguf_path,
            ctx_size=max(len(sequences[index]) for index in group),
            gpu_layers=0,
            cache_type_k="f32",
            cache_type_v="f32",
            flash_attn="off",
            lora=lora,
        )
        try:
            for index in group:
                results[index] = engine.logits(sequences[index])
                done = sum(len(rows) for rows in results.values())
                sink(Progress("llama.cpp", done, total, "tokens", f"sequence {index + 1}"))
        finally:
            engine.close()
    return [results[index] for index in range(len(sequences))]


def _groups(sequences: Sequence[Sequence[int]], long_from: int) -> Iterator[list[int]]:
    short = [index for index, ids in enumerate(sequences) if not long_from or len(ids) <= long_from]
    long = [index for index in range(len(sequences)) if index not in short]
    yield from (group for group in (short, long) if group)
