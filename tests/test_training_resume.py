"""Runs that are stopped go on to the very same adapter, or say why they cannot."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import (
    CorruptFileError,
    InterruptedRun,
    MismatchError,
    ResourceError,
    UsageError,
)
from edgetune.events import Event, Metrics, Progress
from edgetune.training import TrainSettings, resume, train
from edgetune.training.checkpoint import list_checkpoints
from tests.checkpoints import edit_json, write_checkpoint
from tests.tiny_runs import adapter_bytes, stop_after, tiny_base, tiny_data, tiny_settings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(base_dir: Path, data_dir: Path, tmp_path: Path) -> TrainSettings:
    return tiny_settings(base_dir, data_dir, tmp_path / "run")


def test_ctrl_c_saves_and_says_how_to_go_on(settings: TrainSettings, tmp_path: Path) -> None:
    told = replace(settings, steps=6, dropout=0.2)
    whole = train(replace(told, out=str(tmp_path / "whole")))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRun, match="Stopped at step 4 of 6") as caught:
        train(told, sink=stop_after(4))
    assert f"edgetune train --resume {told.out}" in caught.value.hint
    assert signal.getsignal(signal.SIGINT) is handler
    assert adapter_bytes(resume(Path(told.out)).path) == adapter_bytes(whole.path)
    with pytest.raises(UsageError, match="is finished"):
        resume(Path(told.out))


def test_resuming_refuses_other_settings_data_or_base(settings: TrainSettings, tmp_path: Path) -> None:

    copies = {"model": tmp_path / "base", "data": tmp_path / "data"}
    shutil.copytree(settings.model, copies["model"])
    shutil.copytree(settings.data[0], copies["data"])
    told = replace(settings, model=str(copies["model"]), data=(str(copies["data"]),), steps=4)
    with pytest.raises(InterruptedRun):
        train(told, sink=stop_after(2))
    run_dir = Path(told.out)
    with pytest.raises(UsageError, match=r"--lr 0\.1, was 0\.005"):
        resume(run_dir, settings=replace(told, lr=0.1))
    with pytest.raises(UsageError, match="is there already") as caught:
        train(told)
    assert "--resume" in caught.value.hint

    text = (copies["data"] / "train.jsonl").read_text()
    (copies["data"] / "train.jsonl").write_text(text.replace("fox", "cat"))
    with pytest.raises(UsageError, match=r"data of .* changed"):
        resume(run_dir)
    (copies["data"] / "train.jsonl").write_text(text)
    write_checkpoint(copies["model"], "llama", seed=5, overrides={"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(MismatchError, match="weights differ"):
        resume(run_dir)


def test_a_run_is_resumed_from_another_directory(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(settings.model).parent)
    relative = replace(settings, model="tiny", data=(os.path.relpath(settings.data[0]),), steps=4)
    with pytest.raises(InterruptedRun):
        train(relative, sink=stop_after(2))
    with pytest.raises(UsageError, match="--lr"):
        resume(Path(settings.out), settings=replace(relative, lr=0.1))
    monkeypatch.chdir(tmp_path)
    assert resume(Path(settings.out)).finished


def test_a_run_that_another_process_trains_is_left_alone(settings: TrainSettings) -> None:
    with pytest.raises(InterruptedRun):
        train(replace(settings, steps=4), sink=stop_after(2))
    code = (
        "import sys; from pathlib import Path; from edgetune.training.run_dirs import only_process\n"
        "with only_process(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, settings.out],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UsageError, match="Another process"):
        resume(Path(settings.out))
    holder.kill()
    holder.communicate()
    assert resume(Path(settings.out)).finished


def test_a_full_disk_says_how_to_go_on(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    told = replace(settings, steps=4, save_every=2, eval=False)
    whole = train(replace(told, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(ResourceError, match="disk is full") as caught:
            train(told)
    assert f"--resume {told.out}" in caught.value.hint
    assert not list_checkpoints(Path(told.out))
    assert adapter_bytes(resume(Path(told.out)).path) == adapter_bytes(whole.path)


def test_ctrl_c_while_the_first_loss_is_measured(settings: TrainSettings) -> None:
    def press(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "evaluate" and event.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    told = replace(settings, steps=2, batch_size=2)
    with pytest.raises(InterruptedRun, match="Stopped at step 0 of 2"):
        train(told, sink=press)
    assert "valid_before_loss" in resume(Path(told.out)).metrics


def test_a_broken_checkpoint_is_named(settings: TrainSettings) -> None:
    with pytest.raises(InterruptedRun):
        train(replace(settings, steps=4), sink=stop_after(2))
    (newest,) = list_checkpoints(Path(settings.out))[-1:]
    weights = newest / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match=newest.name):
        resume(Path(settings.out))


def test_data_that_are_gone_or_changed_are_named(settings: TrainSettings, data_dir: Path, tmp_path: Path) -> None:
    rows = Path(shutil.copytree(data_dir, tmp_path / "rows")) / "train.jsonl"
    told = replace(settings, data=(str(rows.parent),), steps=2)
    with pytest.raises(InterruptedRun):
        train(told, sink=stop_after(1))
    held = rows.read_text()
    # The validation rows beside them are not taken for them.
    rows.unlink()
    with pytest.raises(UsageError, match=r"rows/train.jsonl is no longer there"):
        resume(Path(told.out))
    rows.write_text(held + held.splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match="changed since it was started"):
        resume(Path(told.out))
    rows.write_text(held)
    assert resume(Path(told.out)).finished


def test_another_file_of_the_same_checkpoint_is_another_base(
    settings: TrainSettings, base_dir: Path, tmp_path: Path
) -> None:
    from edgetune.export import export_base

    base = tmp_path / "base.gguf"
    export_base(base_dir, base, outtype="q8_0")
    with pytest.raises(InterruptedRun):
        train(replace(settings, model=str(base), steps=2, samples=0), sink=stop_after(1))
    held = base.read_bytes()
    export_base(base_dir, base, outtype="f16")
    with pytest.raises(MismatchError, match=r"base\.gguf changed since .* blocks differ"):
        resume(Path(settings.out))
    base.write_bytes(held)
    assert resume(Path(settings.out)).finished


def test_a_second_ctrl_c_stops_at_once_and_says_where_it_goes_on(settings: TrainSettings) -> None:
    def press_twice(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == 3 and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    told = replace(settings, steps=4, save_every=2)
    with pytest.raises(InterruptedRun, match="Stopped at once; its last checkpoint is checkpoint-2") as caught:
        train(told, sink=press_twice)
    assert f"--resume {told.out}" in caught.value.hint
    assert [path.name for path in list_checkpoints(Path(told.out))] == ["checkpoint-2"]
    assert resume(Path(told.out)).finished


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_with_a_changed_byte_is_named(settings: TrainSettings, name: str) -> None:
    with pytest.raises(InterruptedRun):
        train(replace(settings, steps=4, save_every=1), sink=stop_after(2))
    newest = list_checkpoints(Path(settings.out))[-1]
    held = (newest / name).read_bytes()
    # In the middle of the last tensor, or of the numbers of a random state: what still can be read.
    place = held.index(b'"numpy"') + 40 if name == "state.json" else len(held) - 7
    place += next(at for at, byte in enumerate(held[place:]) if chr(byte) in "012345678" or name != "state.json")
    (newest / name).write_bytes(held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :])
    with pytest.raises(CorruptFileError, match=f"{name} is not what was written") as caught:
        resume(Path(settings.out))
    assert "Remove it" in caught.value.hint
    shutil.rmtree(newest)
    assert resume(Path(settings.out)).finished


def test_a_best_adapter_that_cannot_be_read_is_named(settings: TrainSettings) -> None:
    run = train(replace(settings, steps=2, metric="loss", eval_every=1, save_every=1))
    (best,) = run.path.glob("best-*")
    (best / "adapter_model.safetensors").write_bytes(b"cut")
    edit_json(run.path / "edgetune.json", finished=False)
    with pytest.raises(CorruptFileError, match=f"{best.name}, cannot be read"):
        resume(run.path)
