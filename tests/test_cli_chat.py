"""chat, generate and tokenize as a person or a script runs them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from edgetune.chat import open_session
from edgetune.chat.adapters import split_scale
from edgetune.chat.database import ChatDatabase
from edgetune.chat.open_chat import OpenChat
from edgetune.cli import line_mode
from edgetune.cli.main import run
from edgetune.errors import EdgetuneError, ExitCode, UsageError
from edgetune.events import Event, Notice
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.library import register
from edgetune.opening.files import choose_model
from tests.chats import Typed, chat_through
from tests.ggufs import QUERY, base_gguf, checkpoint, lora_gguf, write_lora

FAST = ["-t", "1", "--temp", "0", "-n", "8"]


def edgetune(*arguments: str, stdin: str | bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    raw = stdin.encode() if isinstance(stdin, str) else stdin
    return subprocess.run(
        [sys.executable, "-m", "edgetune", *arguments], input=raw, capture_output=True, env=os.environ, timeout=120
    )


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def adapter_for(tmp_path: Path, seed: int = 0, name: str = "tuned") -> Path:
    metadata = fingerprint_checkpoint(checkpoint(seed=seed)).to_metadata()
    return write_lora(tmp_path / f"{name}.gguf", QUERY, metadata=metadata)


def test_generate_prints_the_text_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = base_gguf()
    capsys.readouterr()
    code, out, err = called(capsys, "generate", str(path), "hello", *FAST)
    assert code == ExitCode.OK
    assert out.strip()
    assert err == ""


def test_generate_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, text, _ = called(capsys, "generate", str(base_gguf()), "hello", *FAST, "--ignore-eos")
    code, out, _ = called(capsys, "generate", str(base_gguf()), "hello", *FAST, "--ignore-eos", "--json")
    values = json.loads(out)
    assert code == ExitCode.OK
    assert values["text"] == text.removesuffix("\n")
    assert len(values["tokens"]) == 8
    assert values["finish_reason"] == "length"
    assert values["timings"]["generated_tokens"] == 8


def test_generate_takes_the_template_unless_raw(capsys: pytest.CaptureFixture[str]) -> None:
    def prompt_tokens(*options: str) -> int:
        _, out, _ = called(capsys, "generate", str(base_gguf()), "hello", *FAST, "--json", *options)
        return int(json.loads(out)["timings"]["prompt_tokens"])

    raw, templated, with_system = prompt_tokens("--raw"), prompt_tokens(), prompt_tokens("--system", "Be brief.")
    assert raw < templated < with_system
    code, _, err = called(capsys, "generate", str(base_gguf()), "x", "--raw", "--system", "y", *FAST)
    assert code == ExitCode.USAGE
    assert "system prompt" in err


def test_generate_works_without_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "generate", str(base_gguf(chat_template=None)), "hello", *FAST)
    assert code == ExitCode.OK
    assert out.strip()


def test_generate_reads_a_pipe() -> None:
    argument = edgetune("generate", str(base_gguf()), "hello", *FAST)
    piped = edgetune("generate", str(base_gguf()), "-", *FAST, stdin="hello\n")
    assert argument.returncode == piped.returncode == 0
    assert piped.stdout == argument.stdout != b""


def test_chat_answers_a_pipe_with_the_reply_alone() -> None:
    generated = edgetune("generate", str(base_gguf()), "hi", *FAST)
    piped = edgetune("chat", "--plain", str(base_gguf()), *FAST, stdin="hi\n")
    assert piped.returncode == 0
    assert piped.stdout == generated.stdout != b""
    assert edgetune("chat", "--plain", str(base_gguf()), *FAST, stdin=b"\xff\xfe").returncode == 0
    empty = edgetune("chat", "--plain", str(base_gguf()), *FAST, stdin="")
    assert empty.returncode == ExitCode.USAGE
    assert b"standard input" in empty.stderr


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys, "chat", str(base_gguf(chat_template=None)))
    assert code == ExitCode.USAGE
    assert out == ""
    assert "no chat template" in err
    assert "--raw" in err


def test_chat_and_generate_never_import_torch() -> None:
    program = (
        "import sys; from edgetune.cli.main import run; code = run(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(repr(heavy) if heavy else code)"
    )
    for arguments in (["chat", str(base_gguf()), *FAST], ["generate", str(checkpoint()), "hi", *FAST]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], input=b"hi", capture_output=True, env=os.environ, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_help_imports_no_engine() -> None:
    program = (
        "import sys; from edgetune.cli.main import run; run([sys.argv[1], '--help']);"
        "sys.exit(repr({'llama_cpp', 'numpy', 'jinja2', 'torch', 'rich'} & set(sys.modules) or ''))"
    )
    for verb in ("chat", "generate", "tokenize"):
        done = subprocess.run([sys.executable, "-c", program, verb], capture_output=True, timeout=60)
        assert done.stderr.strip() in (b"", b"''"), done.stderr
        assert b"Options:" in done.stdout


def test_tokenize(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = called(capsys, "tokenize", str(base_gguf()), "a<|im_end|>", "--json")
    values = json.loads(out)
    assert "".join(values["pieces"]) == "a<|im_end|>"
    assert len(values["ids"]) == len(values["pieces"]) > 3
    _, out, _ = called(capsys, "tokenize", str(base_gguf()), "hi", "--chat", "--json")
    assert "".join(json.loads(out)["pieces"]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    _, out, _ = called(capsys, "tokenize", str(base_gguf()), "hi")
    assert "'hi'" in out or "'h'" in out
    code, _, _ = called(capsys, "tokenize", str(base_gguf(chat_template=None)), "hi", "--chat")
    assert code == ExitCode.USAGE


def test_a_checkpoint_is_converted_once_into_the_cache(tmp_path: Path) -> None:
    model_dir = shutil.copytree(checkpoint(), tmp_path / "mine")
    events: list[Event] = []
    first = choose_model(str(model_dir), (), sink=events.append)
    assert first.base.name == "mine.gguf"
    assert any(isinstance(event, Notice) and "once" in event.text for event in events)
    made = first.base.stat().st_mtime_ns
    assert choose_model(str(model_dir), (), sink=events.append) == first
    assert first.base.stat().st_mtime_ns == made
    whole = first.base.read_bytes()
    os.truncate(first.base, 1000)
    assert choose_model(str(model_dir), (), sink=events.append) == first
    assert first.base.read_bytes() == whole


def test_lora_alone_finds_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapter_for(tmp_path)
    code, _, err = called(capsys, "generate", "hi", "--lora", str(adapter), *FAST)
    assert code == ExitCode.USAGE
    assert "base model" in err
    register(base_gguf())
    code, alone, err = called(capsys, "generate", "hi", "--lora", str(adapter), *FAST)
    assert code == ExitCode.OK
    assert str(base_gguf()) in err
    _, named, _ = called(capsys, "generate", str(base_gguf()), "hi", "--lora", str(adapter), *FAST)
    _, plain, _ = called(capsys, "generate", str(base_gguf()), "hi", *FAST)
    _, off, _ = called(capsys, "generate", str(base_gguf()), "hi", "--lora", f"{adapter}:0", *FAST)
    assert alone == named != plain
    assert off == plain


def test_an_adapter_of_another_base_is_refused_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_for(tmp_path, seed=1)
    arguments = ["generate", str(base_gguf()), "hi", "--lora", str(adapter), *FAST]
    code, out, err = called(capsys, *arguments)
    assert code == ExitCode.UNSUPPORTED
    assert out == ""
    assert "weights" in err
    assert "--force" in err
    assert called(capsys, *arguments, "--force")[0] == ExitCode.OK
    misfit = write_lora(tmp_path / "misfit.gguf", {"blk.0.attn_q.weight": (64, 64)})
    code, _, _ = called(capsys, "generate", str(base_gguf()), "hi", "--lora", str(misfit), "--force", *FAST)
    assert code == ExitCode.UNSUPPORTED


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["generate", "a", "b", "c"], ExitCode.USAGE),
        (["generate", "no-such-model", "hi"], ExitCode.USAGE),
        (["generate", "{gguf}", ""], ExitCode.OK),
        (["generate", "{gguf}", "", "--raw"], ExitCode.USAGE),
        (["generate", "{gguf}", "hi", "--temp", "nan"], ExitCode.USAGE),
        (["generate", "{gguf}", "hi", "--grammar", "root ::= ["], ExitCode.USAGE),
        (["generate", "{gguf}", "hi", "--json-schema", "{", "--grammar", "x"], ExitCode.USAGE),
        (["generate", "{gguf}", "hi", "-c", "2000000000"], ExitCode.RESOURCES),
        (["generate", "{gguf}", "hi", "--lora", "nothing.gguf"], ExitCode.USAGE),
        (["generate", "{gguf}", "word " * 2000], ExitCode.USAGE),
        (["chat", "{lora}"], ExitCode.USAGE),
        (["tokenize", "{empty}", "hi"], ExitCode.FAILED),
        (["chat", "{cut}"], ExitCode.FAILED),
    ],
)
def test_bad_input_is_one_sentence_and_the_right_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "cut.gguf").write_bytes(base_gguf().read_bytes()[:100_000])
    files = {"gguf": str(base_gguf()), "lora": str(lora_gguf()), "empty": "empty.gguf", "cut": "cut.gguf"}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    arguments = [
        argument.format(**files) if "{" in argument[:1] and "}" in argument else argument for argument in arguments
    ]
    got, out, err = called(
        capsys, *arguments, *(FAST if arguments[0] == "generate" and "--temp" not in arguments else [])
    )
    assert got == code, err
    if code:
        assert out == ""
        assert err.startswith(("error: ", "Usage"))
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.gguf", ("a.gguf", 1.0)),
        ("a.gguf:0.5", ("a.gguf", 0.5)),
        ("a.gguf:-1", ("a.gguf", -1.0)),
        (r"C:\models\a.gguf", (r"C:\models\a.gguf", 1.0)),
        (r"C:\models\a.gguf:2", (r"C:\models\a.gguf", 2.0)),
        ("odd:name.gguf", ("odd:name.gguf", 1.0)),
        ("odd:name.gguf:0.25", ("odd:name.gguf", 0.25)),
        (":1", (":1", 1.0)),
    ],
)
def test_adapter_scales(value: str, expected: tuple[str, float]) -> None:
    assert split_scale(value) == expected


def test_a_file_whose_name_ends_like_a_scale(tmp_path: Path) -> None:
    path = tmp_path / "v:1.5"
    path.touch()
    assert split_scale(str(path)) == (str(path), 1.0)
    assert split_scale(f"{path}:2") == (str(path), 2.0)


# --- the chat loop


def test_chats_are_kept_and_resumed_by_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = adapter_for(tmp_path)

    def chat(lines: list[str], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(line_mode, "_build_prompt", lambda chat: Typed([*lines]))
        monkeypatch.setattr(line_mode, "quiet_keyboard", nullcontext)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        code, _, err = called(capsys, "chat", "--plain", *arguments)
        return code, err

    assert chat([], "--continue")[0] == ExitCode.USAGE
    assert chat(["hello"], str(base_gguf()), "--lora", f"{adapter}:0.5", *FAST)[0] == ExitCode.OK
    assert chat(["not this one"], str(base_gguf()), "--no-save", *FAST)[0] == ExitCode.OK
    code, err = chat(["/show", "more"], "--continue", "-t", "1", "-n", "8")
    assert code == ExitCode.OK
    assert "Resumed: hello, 2 messages." in err
    assert "tuned 0.5" in err
    assert "temp 0" in err
    (saved,) = ChatDatabase().sessions()
    assert saved.messages == 4
    code, err = chat(["/title", "/show"], "--resume", saved.id[:4], "--temp", "0.5", "--system", "Brief.", "-t", "1")
    assert "temp 0.5" in err
    assert "Brief." in err
    assert chat([], "--resume", "nothing")[0] == ExitCode.USAGE
    assert chat([], "--continue", "--no-save")[0] == ExitCode.USAGE
    adapter.unlink()
    code, err = chat([], "--continue", "-t", "1")
    assert code == ExitCode.OK
    assert f"/lora {adapter} 0.5" in err
    with_model = chat([], str(base_gguf(seed=1)), "--resume", saved.id, "-t", "1")
    assert with_model[0] == ExitCode.OK
    assert "another model" in with_model[1]


def test_a_piped_message_goes_on_with_a_kept_chat(capsys: pytest.CaptureFixture[str]) -> None:
    first = edgetune("chat", "--plain", str(base_gguf()), *FAST, stdin="hi")
    assert ChatDatabase().sessions() == []
    with open_session(base_gguf(), threads=1) as session, OpenChat(session, session.converse(max_tokens=4)) as chat:
        "".join(chat.say("hello"))
    second = edgetune("chat", "--plain", "--continue", *FAST, stdin="hi")
    assert first.returncode == second.returncode == 0
    assert second.stdout
    assert ChatDatabase().sessions()[0].messages == 4


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        choose_model(None, [str(tmp_path / "nothing.gguf")], sink=lambda event: None)
    assert isinstance(caught.value, EdgetuneError)


def test_bytes_that_are_not_utf8_are_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"caf\xe9")
    conversation = chat_through([odd], monkeypatch)
    assert conversation.messages[0]["content"] == "caf\ufffd"
    capsys.readouterr()
    assert called(capsys, "tokenize", str(base_gguf()), odd)[0] == ExitCode.OK
    assert called(capsys, "generate", str(base_gguf()), odd, *FAST)[0] == ExitCode.OK
