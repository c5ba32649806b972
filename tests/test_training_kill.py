"""A process killed with SIGKILL while it trains: what is on the disk then is enough for the very same adapter."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.artifacts import Run
from edgetune.training import TrainSettings, resume, train
from edgetune.training.checkpoint import list_checkpoints, remove_leftovers
from tests.checkpoints import write_checkpoint
from tests.forks import fork, train_and_die, wait
from tests.task_models import write_rows

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@pytest.mark.slow
def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    # One run, killed again and again: behind the first two moments it begins anew, behind the others it goes on.
    killed = (
        "cache, before the run; start, before the run; step, checkpoint 2; checkpoint, checkpoint 2; "
        "export, checkpoint 8; report, checkpoint 8"
    )
    moments = [part.partition(",")[0] for part in killed.split("; ")]
    assert f"1: killed {killed} → same" in kill(tmp_path, "lora", "--at", *moments)


@pytest.mark.slow
def test_a_kill_of_one_of_two_processes_ends_both_and_changes_nothing(tmp_path: Path) -> None:
    assert "1: killed step, checkpoint 2 → same" in kill(tmp_path, "ddp", "--at", "step")


def kill(directory: Path, *words: str) -> list[str]:
    """What the benchmark prints that kills runs and compares what they come to."""
    code = wait(fork(kill_runs, words, log=directory / "log"))
    printed = (directory / "log").read_text(encoding="utf-8")
    assert code == 0, printed
    return printed.splitlines()


def kill_runs(words: Sequence[str]) -> int:
    from benchmarks.kill import main

    return main(words)


@pytest.mark.slow
def test_a_run_that_slept_and_was_killed_comes_to_the_very_same_adapter(tmp_path: Path) -> None:
    import psutil

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = write_checkpoint(tmp_path / "tiny", "llama", overrides=sizes)
    rows = [{"prompt": word, "completion": f" {word}!"} for word in WORDS]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[::4]})
    told = TrainSettings(
        model=str(base), data=(str(data),), out=str(tmp_path / "run"), steps=9, dropout=0.2, grad_accum=2, save_every=3
    )
    whole = train(replace(told, out=str(tmp_path / "whole")))

    run_dir = tmp_path / "run"
    process = fork(train_and_die, told.record(), 8, 5, log=tmp_path / "log")
    assert process.pid is not None
    sleeper = psutil.Process(process.pid)
    while (status := sleeper.status()) != psutil.STATUS_STOPPED:
        assert status != psutil.STATUS_ZOMBIE, (tmp_path / "log").read_text()
        time.sleep(0.05)
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3"]
    sleeper.send_signal(signal.SIGCONT)
    assert wait(process) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not Run.load(run_dir).finished
    assert [path.name for path in list_checkpoints(run_dir)] == ["checkpoint-3", "checkpoint-6"]

    resumed = resume(run_dir)
    name = "adapter_model.safetensors"
    assert (run_dir / name).read_bytes() == (whole.path / name).read_bytes()
    assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]
    assert resumed.metrics["tokens"] == whole.metrics["tokens"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 10))


def test_leftovers_of_a_killed_process_are_removed_from_a_run(tmp_path: Path) -> None:
    for name in (".checkpoint-4.host-1.partial", "..adapter.host-1.old", ".adapter", "checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    for name in ("checkpoint-0", "best-1", "best-3"):
        (tmp_path / name).mkdir()
    for name, best in (("checkpoint-2", {"step": 1}), ("checkpoint-4", {"step": 3})):
        (tmp_path / name / "state.json").write_text(json.dumps({"position": {"best": best}}))
    (tmp_path / ".metrics.jsonl.host-1.partial").touch()
    (tmp_path / "metrics.jsonl").touch()
    remove_leftovers(tmp_path)
    left = ["best-3", "checkpoint-2", "checkpoint-4", "metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    # A checkpoint that cannot be read may be removed by hand: what those before it need stays.
    (tmp_path / "checkpoint-4" / "state.json").write_text("{")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name / "state.json").unlink()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
