"""Which token sequences the distributions are compared on: the user's held-out rows, else built-in text and random ids.

Their number follows the model's size, so that a proof takes seconds on a small model and under a minute on a large one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.data import held_out_ids
from edgetune.parity.reference import Reference
from edgetune.parity.texts import PROBES

_FLOP_BUDGET = 1e12
_MOST_TOKENS, _LEAST_TOKENS = 1536, 96
_MOST_LOGITS = 64_000_000
"""Numbers in one sequence's logits: 256 MB in float32."""
_ROWS_OF_DATA = 16


def choose_sequences(
    reference: Reference | None,
    config: Mapping[str, Any],
    *,
    parameters: int,
    base_dir: Path,
    data_path: Path | None = None,
) -> list[list[int]]:
    """Sequences of token ids to compare on; the last is long where a window or a rope scale begins late."""
    vocabulary = int(config.get("vocab_size") or 0) or 256
    budget = token_budget(parameters)
    context = context_length(config)
    longest = min(context, budget, max(_MOST_LOGITS // vocabulary, 32))
    sequences = [[int(index) for index in np.random.default_rng(7).integers(0, vocabulary, min(48, longest))]]
    texts = _texts(reference, base_dir, data_path)
    for ids in texts:
        room = min(longest, budget - sum(map(len, sequences)))
        if room < 2:
            break
        if len(ids) > 1:
            sequences.append(ids[:room])
    if long := _long_sequence(texts or sequences, config, longest=min(context, _long_budget(parameters, vocabulary))):
        sequences.append(long)
    return [[token for token in ids if token < vocabulary] for ids in sequences]


def token_budget(parameters: int) -> int:
    """Tokens to compare on in all, for a model of this size."""
    return int(min(max(_FLOP_BUDGET / (4 * max(parameters, 1)), _LEAST_TOKENS), _MOST_TOKENS))


def context_length(config: Mapping[str, Any]) -> int:
    """The model's context in tokens; a modest guess when the config does not say."""
    lengths = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    return next((value for value in lengths if isinstance(value, int) and value > 0), 512)


def threshold_length(config: Mapping[str, Any]) -> int:
    """The text length from which the model attends or rotates differently; 0 when there is none."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    original = config.get("original_max_position_embeddings")
    thresholds = [value for value in (window, original) if isinstance(value, int) and value > 0]
    return max((value for value in thresholds if value < context_length(config)), default=0)


def _texts(reference: Reference | None, base_dir: Path, data_path: Path | None) -> list[list[int]]:
    if data_path is not None:
        return held_out_ids(base_dir, data_path, limit=_ROWS_OF_DATA, max_length=256)
    if reference is None:
        return []
    return [reference.encode(text) for text in PROBES]


def _long_budget(parameters: int, vocabulary: int) -> int:
    return int(min(4 * _FLOP_BUDGET / (4 * max(parameters, 1)), 3 * _MOST_LOGITS / vocabulary, 6144))


def _long_sequence(texts: Sequence[Sequence[int]], config: Mapping[str, Any], *, longest: int) -> list[int]:
    wanted = threshold_length(config) + 32
    if wanted == 32 or wanted > longest:
        return []
    together = [token for ids in texts for token in ids]
    return (together * (wanted // len(together) + 1))[:wanted]
