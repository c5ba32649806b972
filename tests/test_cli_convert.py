"""`edgetune convert` from the outside: names, streams, exit codes, and a file that fails its proof."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import LogitsParity, ParityCheck, ParityReport
from edgetune.cli import progress
from edgetune.cli.main import run
from edgetune.cli.verify import report_values
from edgetune.errors import ExitCode
from edgetune.events import Metrics, Notice, Progress
from edgetune.library import list_models
from tests.adapters import write_adapter
from tests.checkpoints import write_checkpoint
from tests.test_export import make_run


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", "llama")


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("cli-peft") / "mine", base_dir, target_modules=["q_proj", "down_proj"])


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for the proof, which has its own tests: the calls made of it. FAIL_PROOF makes it fail."""
    calls: list[dict[str, Any]] = []

    def verify(base: Path, gguf: Path, **settings: Any) -> ParityReport:
        assert gguf.is_file()
        calls.append({"base": base, "gguf": gguf, **settings})
        passed = not os.environ.get("FAIL_PROOF")
        check = ParityCheck("tokenizer", 10, 10 if passed else 9, "" if passed else "'a' is [1] here and [2] there")
        return ParityReport(gguf, settings.get("lora_path"), (check,), LogitsParity(5, 1e-6, 2e-6, 1.0, 1e-3))

    monkeypatch.setattr("edgetune.parity.verify", verify)
    return calls


Calls = list[dict[str, Any]]


def test_a_model_is_named_registered_and_printed(
    base_dir: Path, tmp_path: Path, proof: Calls, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(base_dir)]) == ExitCode.OK
    out, err = capfd.readouterr()
    assert out == f"{tmp_path / 'tiny-F16.gguf'}\n"
    assert "proved" in err
    assert err.endswith("\nNext: edgetune chat tiny-F16.gguf\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-F16.gguf"]
    assert tmp_path / "tiny-F16.gguf" in [entry.path for entry in list_models()]
    assert (proof[0]["base"], proof[0]["merged"]) == (base_dir, False)


def test_quantized_in_json(base_dir: Path, tmp_path: Path, proof: Calls, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(base_dir), "-q", "q4_k_m", "--json"]) == ExitCode.OK
    values = json.loads(capfd.readouterr().out)
    assert (values["path"], values["type"]) == (str(tmp_path / "tiny-Q4_K_M.gguf"), "Q4_K_M")
    assert values["bytes"] == (tmp_path / "tiny-Q4_K_M.gguf").stat().st_size
    assert values["parity"]["passed"] is True
    assert values["parity"]["gguf"] == values["path"]


def test_an_adapter_lands_beside_its_weights(
    base_dir: Path, adapter_dir: Path, proof: Calls, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(adapter_dir), "--outtype", "q8_0", "--data", str(base_dir / "config.json")]) == 0
    assert capfd.readouterr().out == f"{adapter_dir / 'adapter-Q8_0.gguf'}\n"
    call = proof[0]
    assert (call["base"], call["adapter_dir"]) == (base_dir, adapter_dir)
    assert call["data_path"] == base_dir / "config.json"
    assert not call["gguf"].exists(), "the base made for the comparison is gone"
    assert not [path for path in adapter_dir.iterdir() if path.name.startswith(".")]


def test_a_base_of_the_library_is_used_for_the_comparison(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, proof: Calls
) -> None:
    assert run(["convert", str(base_dir), "-o", "base.gguf"]) == ExitCode.OK
    assert run(["convert", str(base_dir), "-q", "Q4_K_M"]) == ExitCode.OK
    assert run(["convert", str(adapter_dir), "-o", "adapter.gguf"]) == ExitCode.OK
    assert proof[-1]["gguf"] == tmp_path / "base.gguf"


def test_merged_into_the_base(base_dir: Path, adapter_dir: Path, tmp_path: Path, proof: Calls) -> None:
    assert run(["convert", str(base_dir), "--merge", str(adapter_dir), "-q", "Q8_0"]) == ExitCode.OK
    assert (tmp_path / "tiny-mine-Q8_0.gguf").is_file()
    assert (proof[0]["merged"], proof[0]["adapter_dir"]) == (True, adapter_dir)


def test_without_source_the_newest_run_not_converted_is_taken(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert"]) == ExitCode.USAGE
    for age, name in enumerate(("older", "newer")):
        weights = make_run(adapter_dir, base_dir, tmp_path / "runs" / name).path / "adapter_model.safetensors"
        for old in weights.parent.glob("*.gguf"):
            old.unlink()
        os.utime(weights, (1_000_000 + age, 1_000_000 + age))
    capfd.readouterr()
    for expected in ("newer", "older"):
        assert run(["convert", "--no-verify"]) == ExitCode.OK
        assert capfd.readouterr().out == f"{Path('runs') / expected / 'adapter-F16.gguf'}\n"
    assert run(["convert"]) == ExitCode.USAGE
    assert "converted already" in capfd.readouterr().err


def test_a_failed_proof_keeps_the_name_free(
    base_dir: Path, tmp_path: Path, proof: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.gguf").write_bytes(b"an older file")
    monkeypatch.setenv("FAIL_PROOF", "1")
    assert run(["convert", str(base_dir), "-o", "out.gguf"]) == ExitCode.PARITY
    out, err = capfd.readouterr()
    assert out == ""
    assert "out.gguf" in err
    assert "'a' is [1] here" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.failed"]
    assert (tmp_path / "out.gguf").read_bytes() == b"an older file"


def test_the_real_proof_runs(
    base_dir: Path, adapter_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(base_dir), "--merge", str(adapter_dir), "-o", "m.gguf", "--json"]) == ExitCode.OK
    parity = json.loads(capfd.readouterr().out)["parity"]
    assert parity["logits"]["max_kl"] < 1e-3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{adapter}", "-q", "Q4_K_M"], "not quantized"),
        (["{adapter}", "--merge", "{adapter}"], "adapter itself"),
        (["{adapter}", "--base", "{adapter}"], "not a Hugging Face model"),
        (["{base}", "--base", "{base}"], "--base is for adapters"),
        (["{base}", "--merge", "{base}"], "not an adapter"),
        (["{base}", "-q", "Q4_K_M", "--outtype", "f16"], "both name"),
        (["{base}", "-q", "Q4_Z"], "not a quant type"),
        (["{base}", "--outtype", "f8"], "f8"),
        (["nowhere"], "nowhere"),
    ],
)
def test_wrong_commands_are_usage_errors(
    base_dir: Path,
    adapter_dir: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    filled = [one.format(base=base_dir, adapter=adapter_dir) for one in arguments]
    assert run(["convert", *filled]) == ExitCode.USAGE
    assert said in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_gguf_already_is_not_converted(base_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(base_dir), "--no-verify", "-o", "a.gguf"]) == ExitCode.OK
    assert run(["convert", "a.gguf"]) == ExitCode.USAGE
    assert "edgetune quantize" in capfd.readouterr().err


def test_refusals_and_broken_files_have_their_exit_codes(base_dir: Path, tmp_path: Path) -> None:
    dora = write_adapter(tmp_path / "dora", base_dir, target_modules=["q_proj"], use_dora=True)
    assert run(["convert", str(dora)]) == ExitCode.UNSUPPORTED
    (dora / "adapter_model.safetensors").write_bytes(b"")
    assert run(["convert", str(dora)]) == ExitCode.FAILED
    assert sorted(path.suffix for path in dora.glob("*.gguf")) == []


def test_numbers_that_json_lacks_are_null(base_dir: Path) -> None:
    nan = float("nan")
    report = ParityReport(base_dir, None, (), LogitsParity(5, nan, nan, 0.0, 1e-3))
    values = json.loads(json.dumps(report_values(report), allow_nan=False))
    assert (values["passed"], values["logits"]["max_kl"]) == (False, None)


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_sparse(capfd: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    sink = progress._Lines(clock)
    for step in range(101):
        clock.now += 0.3
        sink(Progress("write", step, 100, "tensors", f"t{step}"))
    sink(Notice("look", "warning"))
    sink(Metrics(3, {"loss": 0.5}))
    lines = capfd.readouterr().err.splitlines()
    assert lines[-3:] == ["write: done, 100 tensors", "warning: look", "step 3 (train): loss 0.5"]
    assert 3 <= len(lines) <= 7


def test_a_short_stage_is_not_worth_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    sink = progress._Lines(Clock())
    sink(Progress("write", 0, 100, "tensors"))
    sink(Progress("write", 100, 100, "tensors"))
    assert capfd.readouterr().err == ""


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.show_progress() as sink:
        sink(Progress("write", 1, 2, "bytes", "a [b] c"))
        sink(Notice("careful [x]", "warning"))
        sink(Progress("write", 2, 2, "bytes", ""))
    out, err = capfd.readouterr()
    assert out == ""
    assert "careful [x]" in err


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(12, "bytes", "12 B"), (2.5e9, "bytes", "2.5 GB"), (1500, "rows", "1,500 rows"), (3, "", "3")],
)
def test_amounts(value: float, unit: str, text: str) -> None:
    assert progress.amount(value, unit) == text


@pytest.mark.parametrize(("architecture", "verb"), [("t5", "generate"), ("llama", "chat")])
def test_an_adapter_is_used_with_the_command_for_its_base(architecture: str, verb: str, tmp_path: Path) -> None:
    from edgetune.cli.convert import next_command
    from edgetune.conversion import Job
    from tests.gguf_files import write_adapter as write_gguf_adapter

    out_path = write_gguf_adapter(tmp_path / "adapter.gguf", arch=architecture)
    job = Job(tmp_path / "run", tmp_path / "base", out_path, "f16")
    assert next_command(job, "adapter.gguf") == f"{verb} --lora adapter.gguf"
