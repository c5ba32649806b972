"""Broken and mistaken input through the real command line: one sentence, a hint, the right code, no traceback."""

from __future__ import annotations

import errno
import io
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

from edgetune.chat.adapters import split_scale
from edgetune.cli.main import run
from edgetune.library import list_models, register
from tests.checkpoints import edit_json, write_checkpoint
from tests.gguf_files import OTHER_BASE, write_adapter, write_model
from tests.ggufs import base_gguf


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


def test_a_file_where_a_directory_belongs(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model_dir / "model.safetensors"
    before = weights.read_bytes()
    code, message = refused(["convert", str(weights)], capsys)
    assert (code, "takes a directory" in message) == (2, True)
    code, message = refused(["convert", str(model_dir), "-o", str(weights), "--no-verify"], capsys)
    assert (code, "no GGUF file" in message) == (2, True)
    assert weights.read_bytes() == before


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
