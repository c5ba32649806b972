"""Two processes on one machine, as torchrun starts them, against one: the same losses, files written once, resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.cli.main import run as edgetune
from edgetune.training.processes import World, join_processes
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(sys.platform == "win32", reason="no gloo")]

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("processes")
    base = write_checkpoint(directory / "tiny", "llama")
    # Eleven rows in fours: the last step of an epoch has three parts, shared unevenly.
    rows = [{"prompt": word * n, "completion": f" {word}!" * n} for word in WORDS for n in (1, 2)][:11]
    data = write_rows(directory / "data", {"train": rows, "valid": rows[::3]})
    flags = ["--task", "completion", "--dtype", "f32", "--rank", "4", "--lr", "5e-3", "--device", "cpu"]
    return ["train", "-m", str(base), "-d", str(data), *flags]


def launch(words: list[str], *, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`words` under torchrun, on this machine alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "edgetune", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def losses(run_dir: Path, split: str) -> list[float]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if entry["split"] == split]


def tensors(run_dir: Path) -> dict[str, Any]:
    import safetensors.torch

    return safetensors.torch.load_file(run_dir / "adapter_model.safetensors")


def test_two_processes_take_the_steps_of_one(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--steps", "6", "--save-every", "2"]
    assert edgetune([*words, "-o", str(tmp_path / "one")]) == 0
    done = launch([*words, "-o", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert done.stderr.count("Next: edgetune convert") == 1
    for split in ("train", "valid"):
        assert losses(tmp_path / "two", split) == pytest.approx(losses(tmp_path / "one", split), rel=1e-4)
    one, two = (json.loads((tmp_path / name / "edgetune.json").read_text()) for name in ("one", "two"))
    assert two["metrics"]["tokens"] == one["metrics"]["tokens"]
    assert two["metrics"]["learned_tokens"] == one["metrics"]["learned_tokens"]
    mine, theirs = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )


def test_a_run_of_two_processes_is_finished_by_one(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--steps", "6", "--save-every", "2", "--dropout", "0.1"]
    assert launch([*words, "-o", str(tmp_path / "run")]).returncode == 0
    before = losses(tmp_path / "run", "train")
    # What a kill after step 4 leaves.
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    record = json.loads((tmp_path / "run" / "edgetune.json").read_text())
    (tmp_path / "run" / "edgetune.json").write_text(json.dumps({**record, "finished": False}))
    shutil.copytree(tmp_path / "run", tmp_path / "again")

    assert launch(["train", "--resume", str(tmp_path / "run")]).returncode == 0
    assert losses(tmp_path / "run", "train") == before
    assert edgetune(["train", "--resume", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again", "train")[:4] == before[:4]
    assert len(losses(tmp_path / "again", "train")) == 6


def test_a_wrong_flag_ends_all_processes(words: list[str], tmp_path: Path) -> None:
    done = launch([*words, "--steps", "1", "--max-length", "3", "-o", str(tmp_path / "run")])
    assert done.returncode != 0
    assert "--max-length is 3" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sequences_are_shared_once_each() -> None:
    parts = [[1, 2, 3, 4], [5, 6, 7], [8]]
    shares = [World(rank, 3).share(parts, divisible=True) for rank in range(3)]
    assert sorted(row for share in shares for part in share for row in part) == list(range(1, 9))
    assert World(2, 3).share([[1]], divisible=True) == []
    whole = [World(rank, 2).share(parts, divisible=False) for rank in range(2)]
    assert whole == [[[1, 2, 3, 4], [8]], [[5, 6, 7]]]
    assert World().share(parts, divisible=True) == parts


def test_a_sweep_is_not_for_several_processes(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert edgetune([*words, "--sweep", "lr=1,2"]) == 2
    assert "one process" in capsys.readouterr().err


def test_one_process_needs_no_others() -> None:
    with join_processes("cpu") as world:
        assert world == World()
        assert world.sum(1.5, 2.0) == [1.5, 2.0]
        assert world.text_of_leader("ä") == "ä"
