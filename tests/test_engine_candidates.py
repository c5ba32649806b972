"""The likeliest tokens are found without sorting all of them, and are the ones a sort would find."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.engine.candidates import most_likely, sampled_shares
from edgetune.engine.choices import as_choice
from edgetune.engine.protocol import Candidate
from edgetune.engine.sampler import Seen


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


@pytest.mark.parametrize("kept", [1, 40, 10_000])
def test_what_samplers_leave_is_shared_among_what_they_kept(kept: int) -> None:
    generator = np.random.default_rng(kept)
    ids = generator.permutation(20_000)[:kept].astype(np.int32)
    logits = generator.normal(size=kept).astype(np.float32)
    weights = dict(zip(ids.tolist(), (np.exp(logits) / np.exp(logits).sum()).tolist(), strict=True))
    asked = np.append(ids[:3], [0, 19_999]).astype(np.int32)
    expected = [weights.get(token, 0.0) for token in asked.tolist()]
    assert sampled_shares((ids, logits), asked).tolist() == pytest.approx(expected, rel=1e-4)


def test_alternatives_are_made_when_somebody_looks() -> None:
    spelled: list[int] = []

    def piece(token: int) -> bytes:
        spelled.append(token)
        return b"\xff" if token == 7 else b"ab"

    seen = Seen(
        9, np.array([7, 9, 9], np.int32), np.array([0.5, 0.25, 0.25], np.float32), np.array([False, True, True])
    )
    choice = as_choice(9, seen, piece, start=3, end=5)
    assert (choice.probability, choice.sampled, choice.start, choice.end) == (0.25, 1.0, 3, 5)
    assert len(choice.alternatives) == 2
    assert not spelled
    assert choice.alternatives == (Candidate(7, "\ufffd", 0.5, 0.0), Candidate(9, "ab", 0.25, 1.0))
    assert choice.alternatives != tuple(choice.alternatives[:1])
    assert choice.alternatives[-1].id == 9
    assert spelled == [7, 9]
