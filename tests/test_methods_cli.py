"""Runs of other methods from the command line: what runs them, what converts them, what is said."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from edgetune.cli.main import run as edgetune
from edgetune.errors import ExitCode
from edgetune.training import TrainSettings, train
from tests.adapters import gguf_logits, peft_logits
from tests.test_methods import chats, decoder, encoder, labelled, settings, told, trained_logits

__all__ = ["chats", "decoder", "encoder", "labelled", "settings"]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_generate_runs_a_houlsby_run_in_torch(
    settings: TrainSettings, decoder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = train(told(settings, "houlsby", steps=60, eval=False)).path
    command = ["generate", str(decoder), "fox", "--engine", "torch", "--temp", "0", "-n", "8", "--dtype", "f32"]
    assert edgetune([*command, "--lora", str(trained)]) == ExitCode.OK
    assert capfd.readouterr().out.strip() == "fox!"
    assert edgetune(command) == ExitCode.OK
    assert capfd.readouterr().out.strip() != "fox!"
    assert edgetune(["convert", str(trained)]) == ExitCode.UNSUPPORTED
    said = " ".join(capfd.readouterr().err.split())
    assert "layers of its own between the model's" in said
    assert "--engine torch" in said


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_bottlenecks_classify_in_torch_as_they_were_trained(
    method: str, settings: TrainSettings, encoder: Path, labelled: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from edgetune.engine.torch.encoder import open_torch_encoder

    run = train(replace(settings, method=method, model=str(encoder), data=(str(labelled),), steps=40))
    with open_torch_encoder(encoder, adapter_dir=run.path, dtype="f32") as found:
        scores = found.classify(["the red cat", "the blue dog"])
    assert [one.labels for one in scores] == [("red",), ("blue",)]
    command = ["classify", str(encoder), "the red cat", "--engine", "torch", "--lora", str(run.path), "--json"]
    assert edgetune(command) == ExitCode.OK
    assert json.loads(capfd.readouterr().out)["label"] == "red"


def test_convert_says_that_qlora_met_other_weights_and_merges_into_its_own(
    settings: TrainSettings, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, logits = trained_logits("qlora", told(settings, "qlora", eval=False), monkeypatch)
    out = tmp_path / "merged" / "mine.gguf"
    out.parent.mkdir()
    command = ["convert", str(run.path), "--outtype", "f32", "-o"]
    assert edgetune([*command, str(out), "--dequantized", "--json"]) == ExitCode.OK
    assert json.loads(capfd.readouterr().out)["kind"] == "model"
    assert [path.name for path in out.parent.iterdir()] == ["mine.gguf"]
    # bitsandbytes rounds its products in its own way.
    beside, apart = abs(gguf_logits(out) - logits).mean(), abs(peft_logits(decoder, run.path) - logits).mean()
    assert beside < 0.1 * apart

    assert edgetune([*command, str(tmp_path / "adapter.gguf"), "--no-verify"]) == ExitCode.OK
    assert "--dequantized" in capfd.readouterr().err
    plain = train(told(settings, "lora", eval=False, out=str(tmp_path / "lora"))).path
    assert edgetune(["convert", str(plain), "-o", str(tmp_path / "plain.gguf"), "--no-verify"]) == ExitCode.OK
    assert "--dequantized" not in capfd.readouterr().err
    assert edgetune(["convert", str(plain), "--dequantized"]) == ExitCode.USAGE
    assert "trained with lora" in capfd.readouterr().err


def test_a_full_run_is_converted_as_a_model(
    settings: TrainSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(told(settings, "full", eval=False))
    assert edgetune(["convert", str(run.path), "-o", str(tmp_path / "full.gguf"), "--json"]) == ExitCode.OK
    values = json.loads(capfd.readouterr().out)
    assert values["kind"] == "model"
    assert values["parity"]["passed"]


def test_convert_without_source_takes_a_full_run_and_passes_over_what_no_file_can_hold(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, method in enumerate(("full", "houlsby")):
        run = train(replace(told(settings, method, eval=False), out=f"runs/{method}"))
        for path in run.path.glob("*.safetensors"):
            os.utime(path, (1_000_000 + age, 1_000_000 + age))
    capfd.readouterr()
    assert edgetune(["convert", "--no-verify"]) == ExitCode.OK
    assert Path(capfd.readouterr().out.strip()).name.startswith("full-")
    assert edgetune(["convert", "--no-verify"]) == ExitCode.USAGE
    assert "converted already" in capfd.readouterr().err
