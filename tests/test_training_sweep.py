"""Sweeps: every combination is run and ranked, what is finished is kept, and what does not compare is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.cli.main import run as edgetune
from edgetune.errors import InterruptedRun, UsageError
from edgetune.events import Event, Metrics
from edgetune.training import TrainSettings
from edgetune.training.sweep import Sweep, open_sweep, parse_grid, read_sweep
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    directory = tmp_path_factory.mktemp("sweep")
    base = write_checkpoint(directory / "tiny", "llama")
    rows = [{"prompt": word * n, "completion": f" {word}!"} for word in WORDS for n in (1, 2)]
    data = write_rows(directory / "data", {"train": rows, "valid": rows[::3]})
    return TrainSettings(model=str(base), data=(str(data),), dtype="f32", steps=3, rank=4, task="completion")


def run_all(sweep: Sweep) -> list[Any]:
    return sweep.rank([sweep.run(member) for member in sweep.members])


def test_a_grid_is_read_as_settings_are() -> None:
    grid = parse_grid(["lr=1e-4,2e-4,1e-4  grad-accum=1,2", "--packing=true,false method=lora,dora"])
    assert grid == {
        "lr": (1e-4, 2e-4), "grad_accum": (1, 2), "packing": (True, False), "method": ("lora", "dora")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr", "expected SETTING=VALUE"),
        ("lr=1e-4,", "expected SETTING=VALUE"),
        ("lr=fast", "lr is 'fast'"),
        ("rank=2.5", "rank is '2.5'"),
        ("rnk=4", "no setting 'rnk'"),
        ("schedule=steep", "schedule is 'steep'"),
        ("max-length=64,128", "do not compare"),
        ("target-modules=q_proj,v_proj", "no single value"),
        ("lr=1,2 lr=3", "twice"),
        ("", "names no setting"),
    ],
)
def test_a_wrong_grid_is_refused(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_grid([word])


def test_runs_are_ranked_and_finished_ones_are_kept(settings: TrainSettings, tmp_path: Path) -> None:
    told = replace(settings, out=str(tmp_path / "out"))
    ranked = run_all(open_sweep(told, {"lr": (1e-5, 2e-2), "rank": (2, 4)}))
    assert [outcome.member.values["lr"] for outcome in ranked] == [2e-2, 2e-2, 1e-5, 1e-5]
    assert [outcome.value for outcome in ranked] == sorted(outcome.run.metrics["valid_loss"] for outcome in ranked)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert record["best"] == str(ranked[0].member.path) == str(tmp_path / "out" / ranked[0].member.path.name)
    assert ranked[0].member.path.name.startswith("lr=0.02-rank=")

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/adapter_model.safetensors")}
    more = run_all(open_sweep(told, {"lr": (1e-5, 2e-2, 1e-3), "rank": (2, 4)}))
    assert len(more) == 6
    assert {path: path.stat().st_mtime_ns for path in written} == written

    with pytest.raises(UsageError, match=r"--steps 4, was 3"):
        open_sweep(replace(told, steps=4), {"lr": (1e-5,)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="is there already"):
        open_sweep(replace(told, out=str(tmp_path / "other")), {"lr": (1e-5,)})


def test_a_run_that_was_stopped_is_resumed(settings: TrainSettings, tmp_path: Path) -> None:
    told = replace(settings, out=str(tmp_path / "out"), save_every=1)
    whole = run_all(open_sweep(replace(told, out=str(tmp_path / "whole")), {"lr": (1e-3, 2e-2)}))
    sweep = open_sweep(told, {"lr": (1e-3, 2e-2)})

    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == 2:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun):
        sweep.run(sweep.members[0], sink=stop)
    known = read_sweep(tmp_path / "out")
    assert known is not None
    resumed = run_all(open_sweep(*known))
    assert [outcome.value for outcome in resumed] == [outcome.value for outcome in whole]
    assert [outcome.member.values for outcome in resumed] == [outcome.member.values for outcome in whole]


def test_a_run_that_diverges_comes_last(settings: TrainSettings, tmp_path: Path) -> None:
    told = replace(settings, out=str(tmp_path / "out"), max_grad_norm=0.0)
    ranked = run_all(open_sweep(told, {"alpha": (1e38, 8.0)}))
    assert [bool(outcome.problem) for outcome in ranked] == [False, True]
    assert "no longer a number" in ranked[1].problem
    assert ranked[1].record()["value"] is None


def test_what_does_not_compare_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no validation rows"):
        open_sweep(replace(settings, out=str(tmp_path / "out"), eval=False), {"lr": (1e-4,)})
    with pytest.raises(UsageError, match="--rank is 0"):
        open_sweep(replace(settings, out=str(tmp_path / "out")), {"rank": (4, 0)})
    with pytest.raises(UsageError, match="do not compare by the loss"):
        open_sweep(replace(settings, out=str(tmp_path / "out")), {"beta": (0.1, 0.2)})
    assert not (tmp_path / "out").exists()


def test_a_sweep_on_the_command_line(
    settings: TrainSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", settings.model, "-d", *settings.data, "--steps", "2", "--task", "completion", "--dtype", "f32"]
    for several in (["lr=1e-5,2e-2", "rank=4"], ["lr=1e-5,2e-2 rank=4"], ["lr=1e-5,2e-2", "--sweep", "rank=4"]):
        assert edgetune(["train", "--sweep", *several, *words, "--dry-run"]) == 0
        assert "2 runs: --lr 1e-05 0.02, --rank 4" in capsys.readouterr().err
    assert edgetune(["train", *words, "rank=4"]) == 2
    assert "'rank=4' is not expected here" in capsys.readouterr().err
    sweep = ["--sweep", "lr=1e-5,2e-2", "-o", str(tmp_path / "out")]
    assert edgetune(["train", *words, *sweep]) == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'out' / 'lr=0.02'}\n"
    assert "Run 2 of 2: --lr 0.02" in err
    assert "validation loss" in err
    assert edgetune(["train", "--resume", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["settings"] for run in said["runs"]] == [{"lr": 0.02}, {"lr": 1e-05}]
    assert edgetune(["train", *words, "--sweep", "lr=quick"]) == 2
    assert "lr is 'quick'" in capsys.readouterr().err
