"""The page's sliders, in a JavaScript engine: they leave of a distribution what edgetune's settings leave of it."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest
import quickjs  # type: ignore[import-untyped]
from numpy.typing import NDArray

from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_run import sampled_shares
from edgetune.explain.filters import build_distribution, kept_tokens, softmax
from edgetune.explain.page import Run, Step
from edgetune.explain.widgets import sampler
from tests.test_explain import values_of

Logits = NDArray[np.float32]
VOCABULARY = 5000


class Page:
    """The page's own arithmetic."""

    def __init__(self) -> None:
        self._context = quickjs.Context()
        source = resources.files("edgetune.explain").joinpath("sampling.js").read_text(encoding="utf-8")
        self._context.eval(source + "; globalThis.asked = text => JSON.stringify(sampled(...JSON.parse(text)))")

    def sampled(self, told: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        """As the script asks for it: of the values it is told, under settings."""
        steps = [*([float(np.log(max(share, 1e-30))), 1] for share in told["shares"]), *told["tail"]]
        names = ("temp", "top_k", "top_p", "min_p")
        settings = {name: getattr(sampling, name) for name in names}
        answer = self._context.eval(f"asked({json.dumps(json.dumps([steps, len(told['shares']), settings]))})")
        result: dict[str, Any] = json.loads(answer)
        return result


def told_of(logits: Logits) -> dict[str, Any]:
    """What a page with this distribution tells its script."""
    distribution = build_distribution(logits, lambda ids: [str(one) for one in ids])
    run = Run("base", (), distribution=distribution, steps=(Step(0, "0", 1.0, 1.0),))
    (told,) = values_of(sampler(run, {}), "data-sampler")
    return told


def random_logits(random: np.random.Generator, spread: float) -> Logits:
    return (random.standard_normal(VOCABULARY) * spread).astype(np.float32)


def random_settings(random: np.random.Generator) -> Sampling:
    """Each of them on or off, as sliders may stand."""
    return Sampling(
        temp=round(float(random.uniform(0.05, 3)), 2),
        top_k=int(random.integers(1, 200)) if random.random() < 0.5 else 0,
        top_p=round(float(random.uniform(0.02, 0.99)), 3) if random.random() < 0.6 else 1.0,
        min_p=round(float(random.uniform(0.001, 0.5)), 3) if random.random() < 0.6 else 0.0,
    )


@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0])
def test_sliders_leave_what_the_settings_leave(spread: float) -> None:
    page, random = Page(), np.random.default_rng(7)
    inside = 0
    for _ in range(60):
        logits, sampling = random_logits(random, spread), random_settings(random)
        told, kept = told_of(logits), kept_tokens(logits, sampling)
        result = page.sampled(told, sampling)
        named = len(told["shares"])
        if len(kept) < named:
            inside += 1
            # Numbers on the page have six digits: a token on the very edge may go the other way.
            assert abs(result["left"] - len(kept)) <= 1, sampling
        else:
            # Further down, tokens that are about equally likely are told together: they stay or go together.
            assert abs(result["left"] - len(kept)) <= max(count for _, count in told["tail"]), sampling
        assert result["own"] == pytest.approx(float(softmax(logits)[kept].sum()), abs=0.02)
        after = sampled_shares(logits, sampling)[np.argsort(-logits, kind="stable")]
        mine = np.zeros(named)
        mine[: len(result["weights"])] = result["weights"]
        np.testing.assert_allclose(mine, after[:named], atol=0.02 if result["left"] != len(kept) else 2e-3)
        assert result["rest"] == pytest.approx(float(after[named:].sum()), abs=0.02)
    assert inside > 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temp=0.0),
        Sampling(temp=1.0, top_k=0, top_p=1.0, min_p=0.0),
        Sampling(temp=0.7, top_k=3, top_p=0.5, min_p=0.9),
        Sampling(temp=1.0, top_k=0, top_p=0.0, min_p=0.0),
        Sampling(temp=1.0, top_k=0, top_p=1.0, min_p=1.0),
    ],
)
def test_sliders_at_their_ends(sampling: Sampling) -> None:
    logits = random_logits(np.random.default_rng(3), 3.0)
    result = Page().sampled(told_of(logits), sampling)
    assert result["left"] == len(kept_tokens(logits, sampling))
    assert sum(result["weights"]) + result["rest"] == pytest.approx(1.0)


def test_a_vocabulary_that_is_named_as_a_whole_is_exact() -> None:
    page, random = Page(), np.random.default_rng(5)
    for _ in range(100):
        logits, sampling = random_logits(random, 2.0)[:64], random_settings(random)
        result = page.sampled(told_of(logits), sampling)
        after = sampled_shares(logits, sampling)[np.argsort(-logits, kind="stable")]
        assert result["left"] == np.count_nonzero(after)
        np.testing.assert_allclose(result["weights"], after[: result["left"]], atol=1e-4)
        assert result["rest"] == 0
