"""chat, generate and tokenize as a person or a script runs them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgetune.chat import Conversation, open_session
from edgetune.chat.adapters import split_scale
from edgetune.chat.commands import COMMANDS, complete
from edgetune.chat.database import ChatDatabase
from edgetune.chat.open_chat import OpenChat
from edgetune.cli import line_mode
from edgetune.cli.main import run
from edgetune.cli.model_options import choose_model
from edgetune.cli.terminal import write_text
from edgetune.engine.sampling import Sampling
from edgetune.errors import EdgetuneError, ExitCode, UsageError
from edgetune.events import Event, Notice
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.library import register
from edgetune.paths import home_dir
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


class Typed:
    """Stands for the terminal: hands over lines, then end of input."""

    def __init__(self, lines: list[str | type[BaseException]]) -> None:
        self.lines = iter(lines)
        self.drafts: list[str] = []

    def prompt(self, _message: str, *, default: str = "") -> str:
        self.drafts.append(default)
        line = next(self.lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def chat_through(lines: list[Any], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Conversation:
    monkeypatch.setattr(line_mode, "_build_prompt", lambda chat: Typed(lines))
    with open_session(base_gguf(), threads=1) as session:
        conversation = Conversation(session.engine, sampling=Sampling(temp=0), max_tokens=8, **options)
        with OpenChat(session, conversation) as chat:
            line_mode.run_line_mode(chat)
    return conversation


def test_a_chat_in_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = chat_through(["hello", "", KeyboardInterrupt, '"""two\nlines"""', "/bye", "never"], monkeypatch)
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["hello", "two\nlines"]
    captured = capsys.readouterr()
    replies = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
    assert captured.out == "".join(f"{reply}\n" for reply in replies)
    assert captured.err.count("/s") >= 2
    assert "reused" in captured.err


def test_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    conversation = chat_through(
        [
            "/temp 0",
            "/set parameter top_k 5",
            "/set parameter num_predict 6",
            "/system Be brief.",
            "hello",
            "/retry",
            "again",
            "/undo",
            f"/save {saved}",
            "/clear",
            f"/load {saved}",
            f"/lora {lora_gguf()} 0.5",
            "more",
            f"/lora {lora_gguf().stem} off",
            "/lora off",
            "/lora",
            "/show",
            "/help",
        ],
        monkeypatch,
    )
    err = capsys.readouterr().err
    assert conversation.sampling == Sampling(temp=0, top_k=5)
    assert conversation.max_tokens == 6
    assert conversation.system == "Be brief."
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["hello", "more"]
    assert json.loads(saved.read_text())["messages"][0] == {"role": "system", "content": "Be brief."}
    assert f"{lora_gguf().stem} 0.5" in err
    assert f"{lora_gguf().stem} off" in err
    assert "Be brief." in err
    for command in COMMANDS:
        assert f"/{command.name}" in err


def test_a_reply_goes_on_from_another_token_by_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/alternatives", "hello", "/alternatives 3", "/branch 4 2", "/branch 4 nothing", "/branch 99 1", "/branch"]
    conversation = chat_through(lines, monkeypatch)
    first, second = (node for node in conversation.tree.nodes.values() if node.role == "assistant")
    assert second.ids[:3] == first.ids[:3]
    other = first.choices[3].alternatives[1]
    assert second.ids[3] == other.id != first.ids[3]
    err = capsys.readouterr().err
    assert "There is no reply yet" in err
    listed = [line for line in err.splitlines() if "→" in line]
    assert len(listed) == 3
    surest = sorted(choice.probability for choice in first.choices)[2]
    shown = [int(line.split()[0]) - 1 for line in listed]
    assert all(first.choices[index].probability <= surest for index in shown)
    assert shown == sorted(shown)
    assert f"2 {json.dumps(other.text, ensure_ascii=False)}" in err.replace("\n", "") or 3 not in shown
    assert "'nothing' was not among the likely ones" in err
    assert "no token '99'" in err
    assert "* 2" in err


def test_alternatives_are_found_by_number_and_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def branched(alternative: str) -> int:
        conversation = chat_through(["hello", f"/branch 2 {alternative}"], monkeypatch)
        return list(conversation.tree.nodes.values())[-1].ids[1]

    conversation = chat_through(["hello"], monkeypatch)
    third = conversation.tree.path()[-1].choices[1].alternatives[2]
    quoted = json.dumps(third.text, ensure_ascii=False)
    assert branched("3") == branched(quoted) == third.id


@pytest.mark.parametrize(
    "line",
    [
        "/nonsense", "/set", "/set parameter", "/set parameter nothing 1", "/temp hot", "/retry", "/undo", "/save",
        "/load", "/load nothing", "/lora nothing", "/lora nothing off", "/",
        "/alternatives", "/alternatives x", "/branch 1 2",
    ],
)  # fmt: skip
def test_wrong_commands_say_so_and_the_chat_goes_on(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = chat_through([line, "/temp 0.3"], monkeypatch)
    assert "warning: " in capsys.readouterr().err
    assert conversation.sampling.temp == 0.3


def test_ctrl_c_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written: list[str] = []

    def interrupt(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(line_mode, "write_text", interrupt)
    conversation = chat_through(["hello"], monkeypatch)
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith("".join(written))
    assert "Stopped." in capsys.readouterr().err


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


def test_a_full_context_is_foretold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chat_through(["tell me more about it, please"] * 12 + ["/overflow stop", "and again"], monkeypatch)
    err = capsys.readouterr().err
    foretold = err.index("with the next message, the oldest turn will leave it")
    filled, size = map(int, re.findall(r"nearly full \((\d+) of (\d+) tokens\)", err)[0])
    assert size / 2 < filled <= size
    assert foretold < err.index("The context is full: the oldest turn has left it")
    assert "(stop)" in err


def test_a_draft_is_put_into_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = Typed(["hello", "/edit", "/bye"])
    monkeypatch.setattr(line_mode, "_build_prompt", lambda chat: typed)
    with open_session(base_gguf(), threads=1) as session, OpenChat(session, session.converse(max_tokens=3)) as chat:
        line_mode.run_line_mode(chat)
    assert typed.drafts == ["", "", "/edit hello"]


def test_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open_session(base_gguf(), threads=1) as session:
        session.set_adapter(lora_gguf(), 1.0)
        chat = OpenChat(session, session.converse())

        def words(text: str) -> list[str]:
            return [word for word, _ in complete(chat, text)]

        assert words("/l") == ["/lora", "/load"]
        assert words("/lora ") == [lora_gguf().stem, "off"]
        assert words("/set ") == ["parameter"]
        assert "top_k" in words("/set parameter to")
        assert words("hello") == words("/temp ") == []
        assert words("/vote ") == ["up", "down", "off"]
        assert words("/preset gr") == ["greedy"]
        assert words("/export pa") == ["pairs"]
        monkeypatch.chdir(tmp_path)
        (tmp_path / "notes.md").touch()
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "deep.txt").touch()
        assert words("look at @") == ["notes.md", "sub/"]
        assert words("look at @sub/") == ["sub/deep.txt"]
        assert words("look at @nowhere/") == []


@pytest.mark.parametrize(
    ("text", "open_", "message"),
    [
        ("plain", False, "plain"),
        ('"""', True, ""),
        ('"""a', True, "a"),
        ('"""a\nb"""', False, "a\nb"),
        ('"""\na\n"""', False, "a"),
        ('""""""', False, ""),
    ],
)
def test_triple_quotes(text: str, open_: bool, message: str) -> None:
    assert line_mode.is_open(text) == open_
    assert line_mode.unquote(text) == message


def test_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_text("\x1b[2Jraw")
    assert capsys.readouterr().out == "\x1b[2Jraw"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write_text("\x1b[2Jbad\x07 \x9b1m東京\n\t.")
    assert capsys.readouterr().out == "[2Jbad 1m東京\n\t."


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        choose_model(None, [str(tmp_path / "nothing.gguf")], sink=lambda event: None)
    assert isinstance(caught.value, EdgetuneError)


@pytest.fixture
def keyboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """Keys typed at the real prompt."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def test_colours_typed_as_keys_do_not_end_the_chat(keyboard: PipeInput) -> None:
    keyboard.send_text("red \x1b[31mtext\r")
    assert line_mode._build_prompt(cast(OpenChat, None)).prompt(">>> ") == "red text"


def test_a_history_that_cannot_be_kept_ends_no_chat(keyboard: PipeInput) -> None:
    (home_dir() / "history").mkdir(parents=True)
    keyboard.send_text("hello\r")
    assert line_mode._build_prompt(cast(OpenChat, None)).prompt(">>> ") == "hello"


def test_bytes_that_are_not_utf8_are_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"caf\xe9")
    conversation = chat_through([odd], monkeypatch)
    assert conversation.messages[0]["content"] == "caf\ufffd"
    capsys.readouterr()
    assert called(capsys, "tokenize", str(base_gguf()), odd)[0] == ExitCode.OK
    assert called(capsys, "generate", str(base_gguf()), odd, *FAST)[0] == ExitCode.OK
