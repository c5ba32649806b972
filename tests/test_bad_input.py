"""Broken and mistaken input through the real command line: one sentence, a hint, the right code, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edgetune.cli.main import run
from tests.checkpoints import edit_json, write_checkpoint
from tests.gguf_files import OTHER_BASE, write_adapter, write_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama checkpoint; tests change copies of it."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "hf", "llama", overrides={"num_hidden_layers": 1})


@pytest.fixture
def model_dir(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "hf")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *, hint: bool = True) -> tuple[int, str]:
    """Exit code and message of a command that must fail in one sentence, with nothing on stdout."""
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert len(errors) == 1, captured.err
    assert ("hint:  " in captured.err) or not hint, captured.err
    return code, errors[0]


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


@pytest.mark.parametrize("verb", ["show", "path"])
def test_no_such_model(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert refused(["models", verb, "nothing-like-it"], capsys)[0] == 2


def test_an_adapter_where_a_model_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "adapter.gguf")
    code, message = refused(["tokenize", str(adapter), "hello"], capsys)
    assert code in (2, 3)
    assert "adapter" in message


def test_an_adapter_of_another_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "base.gguf")
    adapter = write_adapter(tmp_path / "adapter.gguf", fingerprint=OTHER_BASE)
    code, message = refused(["generate", str(base), "hello", "--lora", str(adapter)], capsys)
    assert code == 3
    assert "weights" in message


def test_a_directory_where_a_file_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert refused(["generate", str(tmp_path / "folder.gguf"), "hello"], capsys)[0] == 2


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


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "model.gguf")
    path.chmod(0)
    assert refused(["models", "show", str(path)], capsys, hint=False)[0] == 1


def test_the_process_itself_ends_in_order(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:-500])
    for arguments in (["generate", str(path), "hello"], ["models", "show", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-m", "edgetune", *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
