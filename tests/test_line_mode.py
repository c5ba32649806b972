"""The chat in lines, as a person types them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edgetune.chat import open_session
from edgetune.chat.commands import COMMANDS
from edgetune.chat.open_chat import OpenChat
from edgetune.cli import line_mode
from edgetune.cli.terminal import write_text
from edgetune.engine.sampling import Sampling
from edgetune.paths import home_dir
from tests.chats import Typed, chat_through
from tests.ggufs import base_gguf, lora_gguf


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


def test_a_choice_against_the_odds_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_through(['/set parameter grammar root ::= "quick" "\\n"', "hello", "/alternatives"], monkeypatch)
    listed = "".join(capsys.readouterr().err.split())
    assert '…*"k"<1%' in listed


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
        "/alternatives", "/alternatives x", "/alternatives 0", "/branch 1 2",
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


def test_what_was_typed_is_kept_for_nobody_else(keyboard: PipeInput) -> None:
    home_dir().mkdir(parents=True, exist_ok=True)
    keyboard.send_text("hello\r")
    assert line_mode._build_prompt(cast(OpenChat, None)).prompt(">>> ") == "hello"
    assert "+hello\n" in (home_dir() / "history").read_text(encoding="utf-8")
    assert os.name == "nt" or (home_dir() / "history").stat().st_mode & 0o077 == 0
