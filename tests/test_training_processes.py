"""Two processes on one machine, from torchrun or started as by it, against one: the same losses, files written once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.cli.main import run as edgetune
from edgetune.training.processes import World, join_processes, launcher_splits
from tests.checkpoints import write_checkpoint
from tests.forks import launch
from tests.task_models import write_model, write_rows

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


def share(words: Sequence[str], tmp_path: Path, *, job: Callable[[Sequence[str]], int] | None = None) -> None:
    """`words` in two processes, which must succeed."""
    log = tmp_path / "log"
    assert launch(words, log=log, job=job) == [0, 0], log.read_text()


def losses(run_dir: Path, split: str) -> list[float]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if entry["split"] == split]


def tensors(run_dir: Path) -> dict[str, Any]:
    import safetensors.torch

    (path,) = run_dir.glob("*model.safetensors")
    return safetensors.torch.load_file(path)


def test_two_processes_of_torchrun_take_the_steps_of_one(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--steps", "6", "--save-every", "2"]
    assert edgetune([*words, "-o", str(tmp_path / "one")]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "edgetune"]
    command = [sys.executable, *launcher, *words, "-o", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
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


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_two_processes_learn_preferences_as_one_does(words: list[str], tmp_path: Path, task: str) -> None:
    rows = [
        {"prompt": f"{word} {n}", "chosen": f"{word}!" * n, "rejected": f"no {word}"} for word in WORDS for n in (1, 2)
    ]
    data = write_rows(tmp_path / "data", {"train": rows[:11], "valid": rows[11:]})
    words = [*words[:4], str(data), *words[5:], "--task", task, "--steps", "4"]
    assert edgetune([*words, "-o", str(tmp_path / "one")]) == 0
    share([*words, "-o", str(tmp_path / "two")], tmp_path)
    for split in ("train", "valid"):
        found = losses(tmp_path / "two", split)
        assert found == pytest.approx(losses(tmp_path / "one", split), rel=1e-4, abs=1e-6)
        assert found[-1] < found[0]


def test_a_run_of_two_processes_is_finished_by_one(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--steps", "6", "--save-every", "2", "--dropout", "0.1"]
    share([*words, "-o", str(tmp_path / "run")], tmp_path)
    before = losses(tmp_path / "run", "train")
    unfinish(tmp_path / "run", "checkpoint-6")
    shutil.copytree(tmp_path / "run", tmp_path / "again")

    share(["train", "--resume", str(tmp_path / "run")], tmp_path)
    assert losses(tmp_path / "run", "train") == before
    assert edgetune(["train", "--resume", str(tmp_path / "again")]) == 0
    assert losses(tmp_path / "again", "train")[:4] == before[:4]
    assert len(losses(tmp_path / "again", "train")) == 6


LABELS = [{"text": f"the {word} {other}", "label": other} for word in WORDS for other in ("red", "blue")][:11]
PAIRS = [{"anchor": f"the {word}", "positive": word} for word in WORDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "rows", "flags"),
    [
        pytest.param("llama", None, ["--method", "full", "--lr", "1e-3"], id="full"),
        pytest.param("bert", LABELS, ["--task", "classification", "--lr", "5e-3"], id="classification"),
        pytest.param("bert", PAIRS, ["--task", "embedding", "--grad-accum", "2", "--lr", "5e-3"], id="embedding"),
    ],
)
def test_other_methods_and_tasks_are_shared_and_gone_on_with(
    words: list[str], tmp_path: Path, base: str, rows: list[dict[str, Any]] | None, flags: list[str]
) -> None:
    if rows is not None:
        data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[::3]})
        # Dropout draws other numbers in every process.
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = write_model(tmp_path / "base", base, overrides=none)
        words = ["train", "-m", str(model), "-d", str(data), *words[7:]]
    words = [*words, "--steps", "6", "--save-every", "2", *flags]
    assert edgetune([*words, "-o", str(tmp_path / "one")]) == 0
    share([*words, "-o", str(tmp_path / "two")], tmp_path)
    for split in ("train", "valid"):
        assert losses(tmp_path / "two", split) == pytest.approx(losses(tmp_path / "one", split), rel=1e-4)
    mine, theirs = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=2e-4)

    # What one process began, two go on with.
    before = losses(tmp_path / "one", "train")
    unfinish(tmp_path / "one", "checkpoint-6")
    share(["train", "--resume", str(tmp_path / "one")], tmp_path)
    assert losses(tmp_path / "one", "train") == pytest.approx(before, rel=1e-4)


def train_counted(words: Sequence[str]) -> int:
    """edgetune, noting how many numbers of the model this process holds before and after the split."""
    assembly: Any = import_module("edgetune.training.assembly")
    directory, *words = words
    split = assembly.split_layers

    def held(adapted: Any) -> int:
        return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in adapted.parameters())

    def counted(adapted: Any, device: torch.device) -> None:
        whole = held(adapted)
        split(adapted, device)
        Path(directory, f"{torch.distributed.get_rank()}.json").write_text(json.dumps([whole, held(adapted)]))

    assembly.split_layers = counted
    return int(edgetune(words))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--batch-size", "2"], id="lora"),
        pytest.param(["--method", "dora", "--grad-checkpointing", "on"], id="dora", marks=pytest.mark.slow),
        pytest.param(["--method", "houlsby", "--no-packing"], id="houlsby", marks=pytest.mark.slow),
        pytest.param(["--method", "qlora"], id="qlora", marks=pytest.mark.slow),
    ],
)
def test_split_layers_take_the_steps_of_whole_ones(words: list[str], tmp_path: Path, options: list[str]) -> None:
    # Of eleven rows in twos, the last is one process's alone: the other one keeps it company.
    words = [*words, "--steps", "6", "--save-every", "2", "--metric", "loss", "--samples", "0", *options]
    assert edgetune([*words, "-o", str(tmp_path / "one")]) == 0
    share([str(tmp_path), *words, "--fsdp", "-o", str(tmp_path / "two")], tmp_path, job=train_counted)
    for split in ("train", "valid"):
        assert losses(tmp_path / "two", split) == pytest.approx(losses(tmp_path / "one", split), rel=1e-4)
    mine, theirs = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    for rank in range(2):
        whole, kept = json.loads((tmp_path / f"{rank}.json").read_text())
        assert kept < 0.75 * whole

    unfinish(tmp_path / "two", "checkpoint-6")
    assert edgetune(["train", "--resume", str(tmp_path / "two")]) == 0
    assert losses(tmp_path / "two", "train") == pytest.approx(losses(tmp_path / "one", "train"), rel=1e-4)


def unfinish(run_dir: Path, newest: str) -> None:
    """What a kill leaves before `newest` was written."""
    shutil.rmtree(run_dir / newest)
    record = json.loads((run_dir / "edgetune.json").read_text())
    (run_dir / "edgetune.json").write_text(json.dumps({**record, "finished": False}))


def test_what_cannot_be_split_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.ggufs import base_gguf

    assert edgetune([*words, "--method", "full", "--fsdp", "-o", str(tmp_path / "run")]) != 0
    assert "--method full leaves none" in capsys.readouterr().err
    gguf = [*words[:1], "-m", str(base_gguf()), *words[3:]]
    assert edgetune([*gguf, "--fsdp", "-o", str(tmp_path / "run")]) != 0
    assert "keeps its weights in blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not launcher_splits()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_splits()


def test_a_wrong_flag_ends_all_processes(words: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launch([*words, "--steps", "1", "--max-length", "3", "-o", str(tmp_path / "run")], log=log) == [2, 2]
    assert "--max-length is 3" in log.read_text()
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
