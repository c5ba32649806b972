"""A process killed with SIGKILL while it trains: what is on the disk then is enough for the very same adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.training.checkpoint import list_checkpoints, remove_leftovers
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_kill_at_any_moment_changes_nothing() -> None:
    moments = ["start", "cache", "step", "checkpoint", "export", "report"]
    places = ["before the run", "before the run", *["checkpoint 2"] * 2, *["checkpoint 8"] * 2]
    lines = kill("lora", "--at", *moments)
    for number, (moment, place) in enumerate(zip(moments, places, strict=True), 1):
        assert f"{number}: killed {moment}, {place} → same" in lines
    assert lines[-1] == "6 of 6 came to what a run left alone leaves"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_kill_of_one_of_two_processes_ends_both_and_changes_nothing() -> None:
    lines = kill("ddp", "--at", "step")
    assert "1: killed step, checkpoint 2 → same" in lines


def kill(*words: str) -> list[str]:
    """What the benchmark prints that kills runs and compares what they come to."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kill", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes are stopped by a signal")
def test_a_process_that_sleeps_in_the_middle_goes_on(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "tiny", "llama")
    rows = [{"prompt": word, "completion": f" {word}!"} for word in WORDS]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[::4]})
    left = {}
    for name, sleeps in (("awake", False), ("asleep", True)):
        code = SLEEPER if sleeps else "import sys; from edgetune.cli.main import run; sys.exit(run(sys.argv[1:]))"
        words = ["train", "-m", str(base), "-d", str(data), "--steps", "4", "--save-every", "1", "--device", "cpu"]
        command = [sys.executable, "-W", "ignore", "-c", code, *words, "-o", str(tmp_path / name)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        if sleeps:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            assert [path.name for path in list_checkpoints(tmp_path / name)] == ["checkpoint-1", "checkpoint-2"]
            assert not (tmp_path / name / "adapter_model.safetensors").exists()
            os.kill(process.pid, signal.SIGCONT)
        assert process.wait() == 0
        left[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert left["asleep"] == left["awake"]


SLEEPER = """
import os, signal, sys
from edgetune.cli.main import run
from edgetune.training.loop import Loop

take_step = Loop.take_step

def take_or_sleep(self):
    if self.position.step == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    take_step(self)

Loop.take_step = take_or_sleep
sys.exit(run(sys.argv[1:]))
"""
"""Trains, and stops as a laptop does that is shut, before its third step."""


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
