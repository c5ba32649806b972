"""llama.cpp's quantizer behind `edgetune quantize`: types, progress, whole files, and what is refused up front."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from converters import convert_base
from edgetune.cli.main import run
from edgetune.cli.quantize import default_output
from edgetune.errors import CorruptFileError, EdgetuneError, ExitCode, ResourceError, UnsupportedError, UsageError
from edgetune.events import Event, Progress
from edgetune.gguf_header import read_gguf_header
from edgetune.quantize import ALIASES, QUANT_TYPES, find_quant_type, quantize
from tests import gguf_files
from tests.adapters import gguf_logits
from tests.checkpoints import write_checkpoint
from tests.encoders import write_encoder
from tests.llama_logits import max_kl

ONE_OF_EACH_KIND = ["F32", "Q5_0", "Q4_1", "Q2_K", "Q3_K_L", "IQ3_M", "IQ4_XS", "TQ1_0", "MXFP4_MOE", "Q1_0"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantize")
    write_checkpoint(directory / "tiny", "llama")
    convert_base(
        directory / "tiny", directory / "tiny-F16.gguf", outtype="f16", metadata={"edgetune.base.name": "tiny"}
    )
    return directory / "tiny-F16.gguf"


@pytest.mark.parametrize("name", ["Q4_K_M", "Q6_K", "Q8_0", "IQ4_NL", "BF16", "COPY"])
def test_makes_a_file_of_the_type_and_keeps_the_metadata(model_path: Path, tmp_path: Path, name: str) -> None:
    gguf = quantize(model_path, tmp_path / "out.gguf", name, threads=1)
    assert gguf.file_type == ("F16" if name == "COPY" else name)
    assert gguf.base_name == "tiny"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_types_of_every_kind_are_made(model_path: Path, tmp_path: Path, name: str) -> None:
    assert quantize(model_path, tmp_path / "out.gguf", name, threads=1).path.stat().st_size > 0


def test_type_table_is_that_of_llama_cpp() -> None:
    import llama_cpp

    named = {
        name.removeprefix("LLAMA_FTYPE_MOSTLY_").removeprefix("LLAMA_FTYPE_ALL_"): value
        for name, value in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    named.pop("NVFP4")  # llama.cpp reads it but has no quantizer for it.
    assert {name: row.ftype for name, row in QUANT_TYPES.items() if name != "COPY"} == named


@pytest.mark.parametrize("written", ["q4_k_m", "Q4_K", "q4-k-m", " Q4_K_M "])
def test_names_are_read_generously(written: str) -> None:
    assert find_quant_type(written).name == "Q4_K_M"
    assert set(ALIASES.values()) <= set(QUANT_TYPES)


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        find_quant_type("Q4_K_X")
    assert "Q4_K" in caught.value.hint


def test_progress_names_tensors_with_sizes_and_types(model_path: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    quantize(model_path, tmp_path / "out.gguf", "Q4_K_M", sink=events.append, threads=1)
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert progress[-1].done == progress[-1].total > 0
    assert any(event.label == "blk.1.ffn_up.weight [256 × 512] f16 → q4_K" for event in progress)
    tensors = {tensor.name for tensor in read_gguf_header(model_path).tensors}
    assert {event.label.split(" ")[0] for event in progress} == tensors


def test_quantized_model_still_answers_alike(model_path: Path, tmp_path: Path) -> None:
    quantize(model_path, tmp_path / "out.gguf", "Q8_0", threads=1)
    assert max_kl(gguf_logits(model_path), gguf_logits(tmp_path / "out.gguf")) < 0.01


def test_types_that_need_an_importance_matrix_are_refused(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="importance matrix"):
        quantize(model_path, tmp_path / "out.gguf", "IQ2_XS")


def test_quantized_input_is_refused_unless_allowed(model_path: Path, tmp_path: Path) -> None:
    quantize(model_path, tmp_path / "q8.gguf", "Q8_0", threads=1)
    with pytest.raises(UsageError, match="quantized already"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    assert not (tmp_path / "q4.gguf").exists()
    assert quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", allow_requantize=True).file_type == "Q4_K_M"


def test_output_must_not_be_the_input(model_path: Path) -> None:
    with pytest.raises(UsageError, match="input itself"):
        quantize(model_path, model_path, "Q4_K_M")


@pytest.mark.parametrize("kept", [0, 3, 40, 5000, -1])
def test_broken_files_are_errors(model_path: Path, tmp_path: Path, kept: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model_path.read_bytes()[:kept])
    with pytest.raises(CorruptFileError):
        quantize(broken, tmp_path / "out.gguf", "Q4_K_M")
    assert not (tmp_path / "out.gguf").exists()


def test_what_llama_cpp_rejects_is_an_error_with_its_reason(model_path: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(model_path.read_bytes().replace(b"llama.block_count", b"llama.block_coumt", 1))
    with pytest.raises(EdgetuneError, match="block_count"):
        quantize(odd, tmp_path / "out.gguf", "Q4_K_M")
    assert not (tmp_path / "out.gguf").exists()


def test_no_room_is_said_before_anything_is_written(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="free"):
        quantize(model_path, tmp_path / "out.gguf", "Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_behind(model_path: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model_path, tmp_path / "out.gguf", "Q4_K_M", sink=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_llama_cpp_is_an_error(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen

    def doomed(command: list[str], **settings: object) -> object:
        crash = "import os; print('GGML_ASSERT(x) failed'); import sys; sys.stdout.flush(); os.abort()"
        return started([sys.executable, "-c", crash], **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", doomed)
    with pytest.raises(EdgetuneError, match="GGML_ASSERT"):
        quantize(model_path, tmp_path / "out.gguf", "Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_command_prints_the_path_alone(model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out_path = tmp_path / "small.gguf"
    assert run(["quantize", str(model_path), str(out_path), "q6_k", "-t", "1"]) == ExitCode.OK
    out, err = capfd.readouterr()
    assert out == f"{out_path}\n"
    assert "Q6_K" in err


def test_command_in_json(model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(model_path), str(tmp_path / "small.gguf"), "Q8_0", "--json"]) == ExitCode.OK
    values = json.loads(capfd.readouterr().out)
    assert (values["type"], values["bytes"]) == ("Q8_0", (tmp_path / "small.gguf").stat().st_size)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["Q4_K_M"], ExitCode.USAGE),
        (["missing.gguf", "Q4_K_M"], ExitCode.USAGE),
        (["{model}", "Q9"], ExitCode.USAGE),
        (["{model}", "IQ1_S"], ExitCode.UNSUPPORTED),
    ],
)
def test_wrong_commands_have_their_exit_codes(model_path: Path, arguments: list[str], code: ExitCode) -> None:
    assert run(["quantize", *(one.format(model=model_path) for one in arguments)]) == code


def test_list_shows_every_type(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "--list", "--json"]) == ExitCode.OK
    assert [row["name"] for row in json.loads(capfd.readouterr().out)] == list(QUANT_TYPES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m-F16.gguf", "m-Q4_K_M.gguf"),
        ("m.bf16.gguf", "m-Q4_K_M.gguf"),
        ("m.gguf", "m-Q4_K_M.gguf"),
        ("Qwen-Q8_0.gguf", "Qwen-Q4_K_M.gguf"),
    ],
)
def test_default_name_replaces_the_type(name: str, expected: str) -> None:
    assert default_output(Path("d") / name, "Q4_K_M") == Path("d") / expected


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_stops_the_command_and_its_child(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgetune", "quantize", str(model_path), str(tmp_path / "out.gguf"), "IQ3_S"]
    process = subprocess.Popen(
        [*command, "-t", "1"], stderr=subprocess.PIPE, env={**os.environ, "EDGETUNE_HOME": str(tmp_path / "home")}
    )
    killer = threading.Timer(0.6, process.send_signal, [signal.SIGINT])
    killer.start()
    _, err = process.communicate(timeout=60)
    killer.join()
    time.sleep(0.1)
    if process.returncode != ExitCode.OK:  # It may have been faster than the signal.
        assert process.returncode == ExitCode.INTERRUPTED, err
        assert b"Traceback" not in err
        assert not [path for path in tmp_path.iterdir() if path.name != "home"]


def test_a_vision_projector_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    projector = gguf_files._write(tmp_path / "mmproj.gguf", "clip", "mmproj", gguf_files.MODEL_SHAPES, {})
    with pytest.raises(UnsupportedError, match="mmproj"):
        quantize(projector, tmp_path / "out.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["mmproj.gguf"]


def test_the_next_command_fits_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_base(write_encoder(tmp_path / "bert", "bert"), tmp_path / "bert.gguf")
    assert run(["quantize", str(tmp_path / "bert.gguf"), str(tmp_path / "small.gguf"), "Q8_0"]) == ExitCode.OK
    assert "Next: edgetune embed " in capsys.readouterr().err
