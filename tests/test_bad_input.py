"""Broken and mistaken input through the real command line: one sentence, a hint, the right code, no traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from edgetune.chat.adapters import split_scale
from edgetune.cli.main import run
from edgetune.library import list_models, register
from tests.gguf_files import OTHER_BASE, write_adapter, write_model
from tests.ggufs import base_gguf
from tests.refusals import refused


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


def test_a_full_disk_anywhere_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr("edgetune.library.list_models", full)
    assert refused(["models", "list"], capsys) == (5, "error: The disk is full: /somewhere.")


def test_flags_click_refuses_look_like_every_other_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["convert", "--foo"],
        ["chta"],
        ["generate", "x", "--seed", str(1 << 32)],
        ["tokenize", "pocket"],
    ):
        assert refused(arguments, capsys)[0] == 2
    assert refused(["generate", "x", "-n", "-2"], capsys)[0] == 2


def test_an_abort_inside_llama_cpp_is_one_sentence(tmp_path: Path) -> None:
    # llama.cpp asserts that no two tokens are spelled alike; a header does not show it.
    path = tmp_path / "model.gguf"
    content = base_gguf().read_bytes()
    start = content.index(b"tokenizer.ggml.tokens")
    one, other = _two_tokens_of_a_length(content, start)
    path.write_bytes(content[: other[0]] + content[one[0] : one[1]] + content[other[1] :])
    done = subprocess.run(
        [sys.executable, "-m", "edgetune", "tokenize", str(path), "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: llama.cpp gave up: ")
    assert len(done.stderr.splitlines()) == 2


def _two_tokens_of_a_length(content: bytes, start: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the first two single-byte tokens of the vocabulary whose key is at `start` stand."""
    position = start + len(b"tokenizer.ggml.tokens") + 4 + 4 + 8
    found: list[tuple[int, int]] = []
    while len(found) < 2:
        length = int.from_bytes(content[position : position + 8], "little")
        if length == 1:
            found.append((position + 8, position + 9))
        position += 8 + length
    return found[0], found[1]


def test_names_and_headers_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "a\x1b[31m\nb.gguf")
    register(path)
    assert run(["models", "show", str(path)]) == 0
    assert run(["models", "list"]) == 0
    assert run(["models", "rm", str(path)]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\\x1b[31m\\nb" in captured.out


def test_a_name_that_is_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / os.fsdecode(b"caf\xe9.gguf"))
    register(path)
    assert [entry.path for entry in list_models() if not entry.embedded] == [path]


def test_links_to_themselves_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    adapter = write_adapter(tmp_path / "adapter.gguf")
    code, message = refused(["generate", "hello", "--lora", str(adapter)], capsys)
    assert (code, "not on this machine" in message) == (2, True)
    assert refused(["models", "rm", "loop.gguf"], capsys)[0] == 2


@pytest.mark.parametrize("scale", ["nan", "inf", "-1e9"])
def test_a_scale_that_makes_garbage(tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: str) -> None:
    base, adapter = write_model(tmp_path / "base.gguf"), write_adapter(tmp_path / "adapter.gguf")
    code, message = refused(["generate", str(base), "hello", "--lora", f"{adapter}:{scale}"], capsys)
    assert (code, "scale" in message) == (2, True)
    assert split_scale(f"{adapter}:-0.5") == (str(adapter), -0.5)


def test_a_model_where_an_adapter_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_model(tmp_path / "base.gguf")
    code, message = refused(["generate", str(base), "hello", "--lora", str(base)], capsys)
    assert (code, "is a model, not an adapter" in message) == (2, True)


def test_nothing_on_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for arguments in (["generate"], ["generate", "-"]):
        code, message = refused(arguments, capsys)
        assert (code, "standard input" in message) == (2, True)


@pytest.mark.skipif(os.name != "posix", reason="streams of POSIX")
def test_readers_that_leave_and_streams_that_are_closed() -> None:
    command = f"'{sys.executable}' -m edgetune quantize --list"
    for line in (
        f"{command} | true; exit ${{PIPESTATUS[0]}}",
        f"{command} >&-",
        f"{command} <&- 2>&- | grep -q Q4_K_M",
    ):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), line


def test_a_disk_that_is_full_behind_stdout() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgetune", "models", "list"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 5


def test_nothing_is_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    code, message = refused(["models", "pull", "owner/model"], capsys)
    assert (code, "offline" in message) == (3, True)
