"""Broken model files, and converting that cannot be done or is ended: one sentence, nothing half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edgetune.cli.main import run
from tests.checkpoints import edit_json, write_checkpoint
from tests.refusals import refused


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint; tests change copies of it."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "hf", "llama", overrides={"num_hidden_layers": 1})


@pytest.fixture
def model_dir(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "hf")


def empty_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"")


def truncated_weights(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def lying_header(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes((1 << 40).to_bytes(8, "little") + content[8:])


def shape_that_lies(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [1 << 50]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def pickled_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()


def unknown_architecture(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", architectures=["WeirdForCausalLM"], model_type="weird")


def config_is_a_list(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[]")


def config_is_not_text(model_dir: Path) -> None:
    (model_dir / "config.json").write_bytes(b'{"architectures": ["\xff\xfe"]}')


def config_is_cut(model_dir: Path) -> None:
    path = model_dir / "config.json"
    path.write_text(path.read_text()[:40])


def config_names_nothing(model_dir: Path) -> None:
    edit_json(model_dir / "config.json", architectures=None)


def config_is_bottomless(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("[" * 200_000)


def template_is_not_text(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_bytes(b"{{ messages }} \xff\xfe")


def templates_are_numbers(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    edit_json(model_dir / "tokenizer_config.json", chat_template=[1, 2])


def index_names_numbers(model_dir: Path) -> None:
    (model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "x"}}')


def index_leads_out(model_dir: Path) -> None:
    (model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../hf/model.safetensors"}}')


def no_tokenizer(model_dir: Path) -> None:
    for path in model_dir.glob("tokenizer*"):
        path.unlink()


def broken_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab"')


def tokenizer_is_a_list(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (empty_weights, 1),
        (truncated_weights, 1),
        (lying_header, 1),
        (shape_that_lies, 1),
        (pickled_weights, 3),
        (no_weights, 3),
        (unknown_architecture, 3),
        (config_is_a_list, 1),
        (config_is_not_text, 1),
        (config_is_cut, 1),
        (config_names_nothing, 1),
        (config_is_bottomless, 1),
        (template_is_not_text, 1),
        (templates_are_numbers, 1),
        (index_names_numbers, 1),
        (index_leads_out, 1),
        (no_tokenizer, 1),
        (broken_tokenizer, 1),
        (tokenizer_is_a_list, 1),
    ],
)
def test_convert_refuses_a_broken_checkpoint(
    model_dir: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Path], None], code: int
) -> None:
    fault(model_dir)
    assert refused(["convert", str(model_dir), "-o", "out.gguf", "--no-verify"], capsys)[0] == code
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["hf"]


def test_a_missing_template_is_said_where_it_is_needed(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_dir / "chat_template.jinja").unlink()
    assert run(["convert", str(model_dir), "-o", "out.gguf", "--no-verify", "--outtype", "f16"]) == 0
    code, message = refused(["tokenize", "out.gguf", "hello", "--chat"], capsys)
    assert code in (2, 3)
    assert "template" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--plain", "{}"],
        ["generate", "{}", "hello"],
        ["tokenize", "{}", "hello"],
        ["models", "show", "{}"],
        ["quantize", "{}", "out.gguf", "Q4_K_M"],
    ],
)
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 40, b"<!doctype html>" * 20])
def test_a_broken_gguf_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    content: bytes,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    code, message = refused([part.format(path) for part in arguments], capsys)
    assert code == 1
    assert "model.gguf" in message


_SLOW = """
import sys, time
import converters
def slow(source, out_path, **options):
    out_path.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
converters.convert_base = slow
from edgetune.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(model_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    out_dir = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", _SLOW, "convert", str(model_dir), "-o", str(out_dir / "x.gguf"), "--no-verify"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert len(list(out_dir.iterdir())) == 1
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in err
    assert list(out_dir.iterdir()) == []


def test_a_file_where_a_directory_belongs(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model_dir / "model.safetensors"
    before = weights.read_bytes()
    code, message = refused(["convert", str(weights)], capsys)
    assert (code, "takes a directory" in message) == (2, True)
    code, message = refused(["convert", str(model_dir), "-o", str(weights), "--no-verify"], capsys)
    assert (code, "no GGUF file" in message) == (2, True)
    assert weights.read_bytes() == before


def test_a_full_disk_before_writing(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, message = refused(["convert", str(model_dir), "-o", "out.gguf", "--no-verify"], capsys)
    assert code == 5
    assert "free" in message
    assert not Path("out.gguf").exists()


def test_a_disk_that_fills_up_while_writing(
    model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("converters.convert_base", full)
    code, message = refused(["convert", str(model_dir), "-o", "out.gguf", "--no-verify"], capsys)
    assert code == 5
    assert "disk is full" in message
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["hf"]


def test_a_mistake_of_ours_is_one_sentence_as_well(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> NoReturn:
        raise TypeError("a secret\nof ours")

    monkeypatch.setattr("converters.convert_base", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, message = refused(["convert", str(model_dir), "-o", "out.gguf", "--no-verify"], capsys)
    assert code == 1
    assert "TypeError: a secret of ours" in message
    (report,) = tmp_path.glob("edgetune-*.txt")
    assert "Traceback" in report.read_text()
