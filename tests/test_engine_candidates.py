"""The likeliest tokens are found without sorting all of them, and are the ones a sort would find."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.engine.candidates import most_likely


@pytest.mark.parametrize("size", [1, 5, 64, 1000, 4097, 151936])
@pytest.mark.parametrize("count", [1, 20, 40])
@pytest.mark.parametrize("shape", ["smooth", "ties", "forbidden", "descending", "ascending"])
def test_the_likeliest_are_those_a_sort_finds(size: int, count: int, shape: str) -> None:
    generator = np.random.default_rng(size + count)
    logits: NDArray[np.float32] = generator.normal(size=size).astype(np.float32)
    if shape == "ties":
        logits = (np.round(logits * 2) / 2).astype(np.float32)
    elif shape == "forbidden":
        logits[generator.random(size) < 0.99] = -np.inf
    elif shape == "descending":
        logits = np.sort(logits)[::-1].copy()
    elif shape == "ascending":
        logits = np.sort(logits)
    found = most_likely(logits, count)
    assert len(set(found.tolist())) == len(found) == min(count, size)
    np.testing.assert_array_equal(logits[found], np.sort(logits)[::-1][:count])
