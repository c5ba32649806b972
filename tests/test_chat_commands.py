"""Commands of the chat, as every front end runs and completes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.chat import Session, open_session
from edgetune.chat.commands import COMMANDS, commands_page, complete
from edgetune.chat.database import ChatDatabase
from edgetune.chat.open_chat import OpenChat
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from tests.chats import GREEDY, do, fresh_chat, say
from tests.ggufs import base_gguf, lora_gguf


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture
def chat(session: Session) -> Iterator[OpenChat]:
    with fresh_chat(session) as opened:
        yield opened


def test_branches_edits_and_votes_by_command(chat: OpenChat) -> None:
    first = say(chat, "hello")
    do(chat, "/vote down")
    assert do(chat, "/edit").draft == "/edit hello"
    assert do(chat, "/edit hi there").reply is not None
    assert chat.conversation.messages[0]["content"] == "hi there"
    assert [left for left, _ in do(chat, "/branch").rows] == ["  1", "* 2"]
    assert do(chat, "/branch 1").moved
    assert chat.conversation.tree.head == first.id
    assert do(chat, "/edit reply").draft == f"/edit reply {first.content}"
    do(chat, "/edit reply A better answer.")
    assert chat.conversation.messages[-1]["content"] == "A better answer."
    begun = do(chat, "/branch from The answer")
    assert begun.reply is not None
    assert begun.reply.text.startswith("The answer")
    for bad in ("/branch 9", "/branch x", "/branch from", "/vote", "/vote sideways", "/tool"):
        with pytest.raises(UsageError):
            do(chat, bad)
    do(chat, "/vote up")
    tree = ChatDatabase().load(chat.saving.session_id)
    assert tree.nodes[first.id].meta["vote"] == "down"
    assert tree.nodes[begun.reply.node.id].meta["vote"] == "up"
    assert tree.nodes[begun.reply.node.id].meta["sampling"]


def test_presets_templates_and_overflow_by_command(chat: OpenChat) -> None:
    do(chat, "/preset greedy")
    assert chat.conversation.sampling == Sampling(temp=0, ignore_eos=True)
    do(chat, "/temp 0.3")
    do(chat, "/preset save mine")
    assert dict(do(chat, "/preset").rows)["mine"] == "temp 0.3"
    do(chat, "/preset balanced")
    do(chat, "/preset mine")
    assert chat.conversation.sampling.temp == 0.3
    do(chat, "/preset delete mine")
    assert "mine" not in dict(do(chat, "/preset").rows)
    assert "No prompt templates" in do(chat, "/template").text
    do(chat, "/template save sum Sum this up: {input}")
    do(chat, "/template save joke Tell a joke.")
    assert dict(do(chat, "/template").rows) == {"joke": "Tell a joke.", "sum": "Sum this up: {input}"}
    assert do(chat, "/template sum").draft == "Sum this up: "
    assert do(chat, "/template sum a b").reply is not None
    assert chat.conversation.messages[-2]["content"] == "Sum this up: a b"
    do(chat, "/template joke about dogs")
    assert chat.conversation.messages[-2]["content"] == "Tell a joke.\n\nabout dogs"
    do(chat, "/template delete joke")
    for bad in ("/template joke", "/template save x", "/template save ../x y", "/preset none", "/overflow burst"):
        with pytest.raises(UsageError):
            do(chat, bad)
    assert "(stop)" in do(chat, "/overflow stop").text
    assert chat.conversation.overflow == "stop"


def test_texts_that_steer_replies_are_checked_at_once_and_taken_back(chat: OpenChat) -> None:
    conversation = chat.conversation
    conversation.sampling = Sampling(temp=0)
    do(chat, '/set parameter grammar root ::= "abc"')
    assert say(chat, "hello").content == "abc"
    for bad in ("grammar root", "logit_bias 999999+1", "logit_bias x", "json_schema [", "json_schema []"):
        with pytest.raises(UsageError):
            do(chat, f"/set parameter {bad}")
    assert say(chat, "hello").content == "abc"
    do(chat, '/set parameter json_schema {"enum": ["a", "b"]}')
    assert say(chat, "hello").content in ('"a"', '"b"')
    do(chat, "/set parameter logit_bias 300+1")
    do(chat, "/set parameter stop two words")
    stop = conversation.stop
    for name in ("grammar", "logit_bias", "stop"):
        do(chat, f"/set parameter {name} off")
    assert conversation.sampling == Sampling(temp=0)
    assert (stop, conversation.stop) == (("two words",), ())


def test_a_chat_that_is_not_kept_leaves_nothing(session: Session) -> None:
    with OpenChat(session, session.converse(sampling=GREEDY, max_tokens=4), save=False) as chat:
        say(chat, "hello")
        for line in ("/sessions", "/search hello", "/resume", "/title x"):
            with pytest.raises(UsageError, match="not kept"):
                do(chat, line)
        do(chat, "/show")
        do(chat, "/clear")
    assert ChatDatabase().sessions() == []
    assert not ChatDatabase().path.exists()


def test_the_table_of_commands_is_a_page() -> None:
    page = commands_page()
    for command in COMMANDS:
        assert f"`/{command.name}" in page
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)


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
