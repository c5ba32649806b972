"""Measuring on a schedule, keeping the best adapter, stopping early, seeds: with good input and with bad."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import run as edgetune
from edgetune.errors import UsageError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, loop, train
from edgetune.training.evaluate import Evaluation
from edgetune.training.tasks import Measured
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> TrainSettings:
    rows = [{"prompt": word, "completion": f" {word}!"} for word in ("fox", "dog", "quick", "brown", "lazy", "over")]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[:2]})
    return TrainSettings(
        model=str(base),
        data=(str(data),),
        out=str(tmp_path / "run"),
        task="completion",
        dtype="f32",
        rank=2,
        lr=1e-2,
        batch_size=2,
        steps=7,
        samples=0,
    )


def measured_steps(run_dir: Path) -> list[int]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in entries if entry["split"] == "valid"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 3, 6, 7]),
        ({"eval_every": 2}, [0, 2, 4, 6, 7]),
        ({"eval_every": 99}, [0, 7]),
        ({"eval": False}, []),
    ],
)
def test_rows_are_measured_on_schedule(settings: TrainSettings, options: dict[str, Any], steps: list[int]) -> None:
    assert measured_steps(train(replace(settings, **options)).path) == steps


def script(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> None:
    """Let the validation rows have these losses: before, at each measurement, and at the end."""
    left = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation(next(left), Measured()))


def test_the_best_is_kept_and_what_is_no_number_is_never_best(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [3.0, math.nan, 2.0, 2.5, math.inf, 2.0])
    run = train(replace(settings, eval_every=1, early_stopping=2, save_every=1, keep_checkpoints=9))
    assert run.metrics["step"] == 4
    assert run.metrics["best"] == {"step": 2, "value": 2.0}
    name = "adapter_model.safetensors"
    kept = (run.path / name).read_bytes()
    assert kept == (run.path / "checkpoint-2" / name).read_bytes()
    assert kept != (run.path / "checkpoint-4" / name).read_bytes()


def test_a_run_whose_loss_is_never_a_number_keeps_its_last_adapter(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [math.nan] * 9)
    run = train(replace(settings, metric="loss", save_every=7))
    name = "adapter_model.safetensors"
    assert run.metrics["best"] == {}
    assert (run.path / name).read_bytes() == (run.path / "checkpoint-7" / name).read_bytes()


def test_stopping_that_cannot_happen_is_told(settings: TrainSettings) -> None:
    said: list[Event] = []
    train(replace(settings, early_stopping=3), sink=said.append)
    texts = [event.text for event in said if isinstance(event, Notice) and event.level == "warning"]
    assert any("--early-stopping 3 cannot stop a run that is measured 3 times" in text for text in texts)
    said.clear()
    train(replace(settings, early_stopping=3, eval_every=1, out=f"{settings.out}-2"), sink=said.append)
    assert not [event for event in said if isinstance(event, Notice) and "cannot stop" in event.text]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval-every", "-1"], "--eval-every is -1, expected 0 or more"),
        (["--early-stopping", "-2"], "--early-stopping is -2, expected 0 or more"),
        (["--early-stopping", "2", "--no-eval"], "--eval is False, expected on, for --metric"),
        (["--metric", "accuracy"], "--metric accuracy is not measured for completion, only loss"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--seed", "9223372036854775808"], "less than 2^63"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: TrainSettings, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-m", settings.model, "-d", *settings.data, "-o", settings.out, "--task", "completion"]
    assert edgetune([*words, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path(settings.out).exists()


def test_the_best_cannot_be_chosen_without_rows_to_choose_by(settings: TrainSettings, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few", {"train": [{"prompt": "fox", "completion": " dog"}]})
    for options in ({"metric": "loss"}, {"early_stopping": 2}):
        with pytest.raises(UsageError, match="no validation rows to choose the best adapter by"):
            train(replace(settings, data=(str(data),), **options))


def test_a_seed_is_one_run_and_another_one_another(settings: TrainSettings, tmp_path: Path) -> None:
    first, again, other, largest = (
        train(replace(settings, seed=seed, steps=2, eval=False, out=str(tmp_path / f"run-{place}")))
        for place, seed in enumerate((5, 5, 6, (1 << 63) - 1))
    )
    name = "adapter_model.safetensors"
    assert (first.path / name).read_bytes() == (again.path / name).read_bytes() != (other.path / name).read_bytes()
    assert largest.finished
