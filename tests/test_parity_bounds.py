"""The bound of the proof where a type rounds so much that little is left to compare: it tightens, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.export import export_base
from edgetune.parity import verify
from edgetune.parity.bounds import LEAST_MARGIN, MARGIN, noise_bound, says_little
from edgetune.parity.distributions import chance_kl
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize(("noise", "factor"), [(0.001, MARGIN), (0.25, 2.0), (0.9, LEAST_MARGIN)])
def test_the_margin_shrinks_as_noise_nears_chance(noise: float, factor: float) -> None:
    bound, bounded = noise_bound(noise, is_moe=False, chance_kl=1.0)
    assert bounded == "mean_kl"
    assert bound == pytest.approx(factor * noise)


def test_a_bound_near_chance_decides_nothing() -> None:
    assert says_little(noise_bound(0.6, is_moe=False, chance_kl=1.0)[0], 1.0)
    assert not says_little(noise_bound(0.2, is_moe=False, chance_kl=1.0)[0], 1.0)


def test_chance_is_what_unrelated_distributions_make() -> None:
    generator = np.random.default_rng(0)
    logits = [generator.normal(0, 2, (64, 300)).astype(np.float32) for _ in range(2)]
    assert 3 < chance_kl(logits) < 5  # 2² for independent normal logits
    assert chance_kl([np.zeros((8, 30), np.float32)]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_proof_that_decides_little_says_so(tmp_path: Path) -> None:
    model_dir = write_checkpoint(tmp_path / "tiny", "llama")
    for name, weak in (("Q2_K", True), ("Q8_0", False)):
        export_base(model_dir, tmp_path / f"{name}.gguf", quant=name, threads=1)
        report = verify(model_dir, tmp_path / f"{name}.gguf")
        assert report.passed
        assert any("the weights, closely" in line for line in report.not_checked) is weak
