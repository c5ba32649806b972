"""What each sampling setting keeps of a distribution, one after the other, in llama.cpp's order.

The rules are llama.cpp's own; they are written again here because its chain tells only what is left at its end.
Everything acts on the logits of one position, (vocabulary,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from edgetune.engine.sampling import Sampling
from edgetune.explain.page import Distribution, Filter, Guess

Logits = NDArray[np.float32]
_NAMED = 200
"""Tokens that a distribution has by name."""
_STEP = 0.02
"""Nats within which other tokens count as alike."""


def softmax(logits: Logits) -> Logits:
    """Probabilities of `logits` along the last axis, in float64 inside."""
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(-1, keepdims=True))
    result: Logits = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return result


def entropy(logits: Logits) -> float:
    """Of the distribution, in nats."""
    shares = softmax(logits).astype(np.float64)
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum())


def build_distribution(logits: Logits, pieces: Callable[[list[int]], list[str]]) -> Distribution:
    """The distribution of `logits` in short: its likeliest tokens by name, the others counted by what they have."""
    shares = softmax(logits).astype(np.float64)
    order = np.argsort(-logits, kind="stable")
    best = order[:_NAMED].tolist()
    named = tuple(Guess(one, piece, float(shares[one])) for one, piece in zip(best, pieces(best), strict=True))
    steps = np.round(np.log(np.maximum(shares[order[_NAMED:]], 1e-30)) / _STEP).astype(int)
    values, counts = np.unique(steps, return_counts=True)
    tail = zip((values[::-1] * _STEP).tolist(), counts[::-1].tolist(), strict=True)
    return Distribution(named, tuple((float(value), int(count)) for value, count in tail))


def iter_filters(logits: Logits, sampling: Sampling) -> Iterator[Filter]:
    """Each filter of `sampling` that is on, with what is left after it; temperature last."""
    own = softmax(logits)
    for name, setting, kept in _stages(logits, sampling):
        yield Filter(name, setting, len(kept), float(own[kept].sum()))


def kept_tokens(logits: Logits, sampling: Sampling) -> NDArray[np.intp]:
    """The tokens that every filter of `sampling` keeps, the likeliest first."""
    return list(_stages(logits, sampling))[-1][2]


def _stages(logits: Logits, sampling: Sampling) -> Iterator[tuple[str, float, NDArray[np.intp]]]:
    kept = np.argsort(-logits, kind="stable")
    if sampling.temp <= 0:
        yield "greedy", 0.0, kept[:1]
        return
    for name, setting, limit in (
        ("top_k", float(sampling.top_k), _top_k),
        ("typical", sampling.typical, _typical),
        ("top_p", sampling.top_p, _top_p),
        ("min_p", sampling.min_p, _min_p),
    ):
        if _is_on(name, setting):
            kept = kept[limit(logits[kept], setting)]
            yield name, setting, kept
    yield "temp", sampling.temp, kept


def _is_on(name: str, setting: float) -> bool:
    return setting > 0 if name in ("top_k", "min_p") else setting < 1


def _top_k(logits: Logits, k: float) -> NDArray[np.intp]:
    return np.arange(min(int(k), len(logits)))


def _typical(logits: Logits, p: float) -> NDArray[np.intp]:
    shares = softmax(logits).astype(np.float64)
    surprise = -np.log(np.maximum(shares, 1e-300))
    order = np.argsort(np.abs(surprise - (shares * surprise).sum()), kind="stable")
    count = int(np.searchsorted(np.cumsum(shares[order]), p, side="right")) + 1
    return np.sort(order[:count])


def _top_p(logits: Logits, p: float) -> NDArray[np.intp]:
    total = np.cumsum(softmax(logits).astype(np.float64))
    return np.arange(min(int(np.searchsorted(total, p, side="left")) + 1, len(logits)))


def _min_p(logits: Logits, p: float) -> NDArray[np.intp]:
    return np.flatnonzero(logits >= logits.max() + np.log(p))
