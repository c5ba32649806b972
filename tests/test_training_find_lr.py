"""The search for a learning rate: what a curve says, a real search, and that it leaves nothing behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.cli.main import run as edgetune
from edgetune.errors import EdgetuneError, UsageError
from edgetune.training import TrainSettings
from edgetune.training.find_lr import HIGHEST, LOWEST, find_lr, read_curve
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    directory = tmp_path_factory.mktemp("search")
    base = write_checkpoint(directory / "tiny", "llama")
    words = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")
    rows = [{"prompt": word * n, "completion": f" {word}!"} for word in words for n in (1, 2, 3)]
    data = write_rows(directory / "data", {"train": rows})
    return TrainSettings(model=str(base), data=(str(data),), dtype="f32", rank=4, task="completion", steps=40)


def test_a_curve_that_falls_and_rises() -> None:
    rates = [10.0 ** (-5 + place / 10) for place in range(40)]
    losses = [3.0] + [3.0 - 2 / (1 + math.exp(-(place - 20))) + max(0, place - 30) ** 2 / 10 for place in range(40)]
    curve = read_curve(rates, losses)
    assert rates[17] <= curve.steepest <= rates[23]
    assert curve.suggestion == pytest.approx(math.sqrt(curve.steepest * curve.lowest), rel=0.05)
    assert rates[26] <= curve.lowest <= rates[32]
    assert curve.diverged
    assert not read_curve(rates[:28], losses[:29]).diverged
    assert read_curve(rates, [*losses[:30], math.nan]).diverged


@pytest.mark.parametrize("losses", [[3.0] * 30, [3.0 + place for place in range(30)], [3.0, math.nan]])
def test_a_loss_that_never_falls_suggests_nothing(losses: list[float]) -> None:
    with pytest.raises(EdgetuneError, match="falls at no learning rate"):
        read_curve([1e-5] * len(losses), losses)


def test_a_search_finds_a_rate_that_learns(settings: TrainSettings) -> None:
    curve = find_lr(settings)
    assert LOWEST < curve.steepest <= curve.suggestion <= curve.lowest <= HIGHEST
    assert min(curve.losses) < 0.8 * curve.losses[0]
    assert curve.rates[0] == LOWEST
    assert find_lr(settings) == curve


def test_a_search_needs_steps(settings: TrainSettings) -> None:
    with pytest.raises(UsageError, match="--steps is 9, expected 10 or more"):
        find_lr(replace(settings, steps=9))


def test_a_search_on_the_command_line_writes_nothing(
    settings: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "-m", settings.model, "-d", *settings.data, "--steps", "40", "--dtype", "f32", "--find-lr"]
    words += ["--task", "completion", "--rank", "4"]
    assert edgetune(words) == 0
    out, err = capsys.readouterr()
    assert f"--lr {out.strip()}, halfway between" in err
    assert edgetune([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["suggestion"] == float(out)
    assert len(said["curve"]) <= 40
    assert not list(tmp_path.iterdir())
    assert edgetune([*words, "--sweep", "lr=1e-4,1e-3"]) == 2
    assert "--find-lr goes with neither" in capsys.readouterr().err
