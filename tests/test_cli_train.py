"""`edgetune train` as a person calls it: plan and preview, the run's path on stdout, resume, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.cli.main import run
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny", "qwen2", overrides={"hidden_size": 64, "num_attention_heads": 4}
    )


@pytest.fixture
def data_path(tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]}
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    return path


def test_dry_run_shows_what_is_learned(base_dir: Path, data_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "<|im_start|>assistant\n«the fox<|im_end|>»" in err
    assert "8 rows, 8 sequences" in err
    assert "chat messages" in err
    assert "parameters are trained" in err


def test_dry_run_as_json(base_dir: Path, data_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "--dry-run", "--json", "--batch-size", "3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"]["steps"] == 9
    # Torch, transformers and peft alone hold more than this; the model is a few megabytes.
    assert said["plan"]["memory_bytes"] > 100e6 or said["plan"]["device"] != "cpu"
    assert said["data"]["splits"]["train"]["rows"] == 8
    shown = said["preview"][0]
    assert "".join(p for p, learned in zip(shown["pieces"], shown["learned"], strict=True) if learned) == (
        "the fox<|im_end|>"
    )


def test_dry_run_shows_the_plan_of_a_recipe(
    base_dir: Path, data_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-m", str(base_dir), "-d", str(data_path), "--recipe", "chat", "--metric", "", "--rank", "4"]
    assert run([*words, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert (
        "task chat, method lora; --batch-size 8 (default 4), --grad-accum 2 (default 1), --rank 4 (default 16)" in err
    )
    assert run([*words, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: said["chosen"][name] for name in ("batch_size", "grad_accum", "rank")} == {
        "batch_size": 8, "grad_accum": 2, "rank": 4
    }  # fmt: skip
    assert "lr" not in said["chosen"]
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "--dry-run"]) == 0
    assert "every setting is the default" in capsys.readouterr().err
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "--recipe", "nosuch", "--dry-run"]) == 2
    assert "no recipe 'nosuch'" in capsys.readouterr().err


def test_the_path_goes_to_stdout_and_a_finished_run_is_not_resumed(
    base_dir: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    (path,) = (tmp_path / "runs").iterdir()
    assert out == f"runs/{path.name}\n"
    assert path.name.startswith("tiny-chat-")
    assert f"edgetune convert runs/{path.name}" in err
    assert run(["train", "--resume", str(path)]) == 2
    assert "is finished" in capsys.readouterr().err
    assert run(["train", "--resume"]) == 2
    assert "no unfinished run" in capsys.readouterr().err


def test_json_is_the_record(
    base_dir: Path, data_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "run"
    flags = ["--steps", "1", "--rank-pattern", "q_proj=2", "--target-modules", "q_proj,v_proj", "--json"]
    assert run(["train", "-m", str(base_dir), "-d", str(data_path), "-o", str(out_dir), *flags]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out_dir / "edgetune.json").read_text())
    assert record["settings"]["target_modules"] == ["q_proj", "v_proj"]
    assert record["settings"]["rank_pattern"] == {"q_proj": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m", "no-such-model", "-d", "{data}"], "no model"),
        (["-d", "{data}"], "No base model"),
        (["-m", "{base}"], "No data"),
        (["-m", "{base}", "-d", "nowhere.jsonl"], "no data at"),
        (["-m", "{base}", "-d", "{data}", "--lr", "-1"], "--lr"),
        (["-m", "{base}", "-d", "{data}", "--lr", "fast"], "--lr"),
        (["-m", "{base}", "-d", "{data}", "--device", "cuda"], "no cuda device"),
        (["-m", "{base}", "-d", "{data}", "--rank-pattern", "q_proj"], "PATTERN=RANK"),
        (["-m", "{base}", "-d", "{data}", "--chat-template", "nowhere.jinja"], "cannot be read"),
        (["-m", "{base}", "-d", "{data}", "--recipe", "nowhere.toml"], "cannot be read"),
        (["--resume", "nowhere"], "no run at"),
    ],
)
def test_wrong_use_is_one_sentence(
    base_dir: Path,
    data_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    import torch

    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    words = [flag.format(base=base_dir, data=data_path) for flag in flags]
    out = [] if "--resume" in flags else ["-o", str(tmp_path / "run")]
    assert run(["train", *words, *out]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
