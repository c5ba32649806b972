"""A process killed with SIGKILL while it trains: what is on the disk then is enough for the very same adapter."""

from __future__ import annotations

import os
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
def test_a_kill_at_any_moment_changes_nothing(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "tiny", "llama")
    rows = [{"prompt": word * n, "completion": f" {word}!" * n} for word in WORDS for n in (1, 2)]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[::4]})
    moments = ["start", "step", "checkpoint", "export", "report"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kill", "-m", str(base), "-d", str(data)]
    done = subprocess.run(
        [*command, "--at", *moments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for number, (moment, place) in enumerate(
        zip(moments, ["before the run", "checkpoint 2", "checkpoint 2", "checkpoint 8", "checkpoint 8"], strict=True), 1
    ):
        assert f"{number}: killed {moment}, {place} → same" in lines
    assert lines[-1] == "5 of 5 came to the same adapter"


def test_leftovers_of_a_killed_process_are_removed_from_a_run(tmp_path: Path) -> None:
    for name in (".checkpoint-4.host-1.partial", "..adapter.host-1.old", ".adapter", "checkpoint-2", "best-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    (tmp_path / "checkpoint-2" / "state.json").touch()
    (tmp_path / ".metrics.jsonl.host-1.partial").touch()
    (tmp_path / "metrics.jsonl").touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-2", "checkpoint-2", "metrics.jsonl"]
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
