"""Kept chats: written as they run, found again, resumed with their KV state."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.chat import Conversation, Node, Session, kv_states, open_session, sqlite_file
from edgetune.chat.autosave import Autosave
from edgetune.chat.database import ChatDatabase, SavedSession, title_of
from edgetune.chat.node_values import pack_choices, unpack_choices
from edgetune.chat.open_chat import OpenChat
from edgetune.engine.protocol import Candidate, TokenChoice
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


def test_what_is_said_is_there_again(chat: OpenChat) -> None:
    chat.conversation.system = "Be brief."
    first = say(chat, "hello 東京 \ud800")
    say(chat, "and then?")
    do(chat, "/retry")
    other = ChatDatabase()
    (saved,) = other.sessions()
    assert saved.title == "hello 東京 ?"
    assert saved.model == str(base_gguf())
    assert saved.fingerprint == chat.session.fingerprint != ""
    assert (saved.system, saved.sampling) == ("Be brief.", {"temp": 0, "ignore_eos": True})
    assert saved.messages == 5
    tree = other.load(saved.id)
    mine = chat.conversation.tree
    assert tree.head == mine.head
    assert list(tree.nodes) == list(mine.nodes)
    again = tree.nodes[first.id]
    assert replace(again, choices=[]) == replace(first, choices=[])
    assert [choice.id for choice in again.choices] == list(first.ids)
    assert tree.siblings(str(tree.head)) == [tree.nodes[one.id] for one in mine.siblings(str(mine.head))]


def test_a_resumed_chat_goes_on_as_if_it_had_never_ended(chat: OpenChat, session: Session) -> None:
    say(chat, "hello there, tell me a long story about a dog")
    said = say(chat, "and then?")
    prompt = chat.conversation.prompt_ids()
    saved = chat.saving.session_id
    chat.close()
    session.engine.forget()
    with OpenChat(session, session.converse(max_tokens=12)) as later:
        outcome = do(later, f"/resume {saved[:6]}")
        assert "no evaluation" in outcome.text
        assert outcome.moved
        assert later.conversation.sampling == GREEDY
        assert later.conversation.prompt_ids() == prompt
        assert later.conversation.messages[-1]["content"] == said.content
        reply = later.say("more")
        text = "".join(reply)
        new = reply.timings.prompt_tokens - reply.timings.reused_tokens
        assert new <= len(later.conversation.prompt_ids()) - len(prompt) + 4
        assert len(ChatDatabase().sessions()) == 1
        assert ChatDatabase().sessions()[0].messages == 6
        # Without the state, the same tokens are evaluated anew and say the same.
        later.conversation.undo()
        session.engine.forget()
        assert "".join(later.say("more")) == text


def test_a_question_that_was_never_answered_can_be_sent_again(chat: OpenChat, session: Session) -> None:
    say(chat, "hello")
    chat.say("lost")
    saved = ChatDatabase().find(chat.saving.session_id)
    assert saved.messages == 3
    with OpenChat(session, session.converse(sampling=GREEDY, max_tokens=4)) as later:
        outcome = do(later, "/resume")
        assert outcome.draft == "lost"
        assert [message["role"] for message in later.conversation.messages] == ["user", "assistant"]
        say(later, outcome.draft)
        assert ChatDatabase().find(saved.id).messages == 5


def test_a_state_of_other_adapters_is_not_taken_up(chat: OpenChat, session: Session) -> None:
    say(chat, "hello there, tell me a long story about a dog")
    saved = chat.saving.session_id
    chat.close()
    session.engine.forget()
    session.set_adapter(lora_gguf(), 1.0)
    with OpenChat(session, session.converse()) as later:
        assert "no evaluation" not in do(later, f"/resume {saved}").text
        assert len(later.conversation.messages) == 2
    session.engine.set_adapters([])
    with OpenChat(session, session.converse()) as later:
        chat.database.states.path(saved).write_bytes(b"damaged")
        assert "no evaluation" not in do(later, f"/resume {saved}").text


def test_search(chat: OpenChat) -> None:
    say(chat, "Where is the Antarctic research station?")
    do(chat, "/clear")
    say(chat, "私は東京タワーが好きです。 50% of it_all")
    database = chat.database

    def found(words: str) -> list[str]:
        return [one.session.title for one in database.search(words)]

    assert found("antarctic STATION") == ["Where is the Antarctic research station?"]
    assert found("東京タワー") == found("東京") == found("50%") == found("it_a") == [database.sessions()[0].title]
    assert found("antarctic tower") == found("arctic-nothing") == found("x_a") == found("") == []
    assert found('"') == found("AND") == found("ntarct OR") == []
    (hit,) = database.search("research")
    assert "Antarctic research station" in hit.excerpt
    assert database.load(hit.session.id).nodes[hit.node].role == "user"
    rows = do(chat, "/search research").rows
    assert rows[0][0] == hit.session.id[:8]
    assert "Nothing" in do(chat, "/search nothingness").text


def test_search_without_full_text_search(chat: OpenChat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite_file, "_INDEX", "CREATE VIRTUAL TABLE words USING nothing (content)")
    plain = ChatDatabase(tmp_path / "plain.sqlite")
    plain.save(SavedSession("a", "t"), [Node("user", "Where is the station?")], head=None)
    assert [one.excerpt for one in plain.search("STATION where")] == ["Where is the station?"]
    assert plain.search("stations") == []
    plain.delete("a")
    assert plain.search("station") == []
    assert plain.sessions() == []


def test_a_changed_message_is_found_by_its_new_words(tmp_path: Path) -> None:
    database = ChatDatabase(tmp_path / "chats.sqlite")
    node = Node("assistant", "first words")
    session = SavedSession("a")
    database.save(session, [node], head=node.id)
    assert database.search("first")
    node.content = "second words"
    database.save(session, [node], head=node.id)
    assert database.search("second")
    assert not database.search("first")


def test_titles_and_deletion(chat: OpenChat) -> None:
    with pytest.raises(UsageError):
        do(chat, "/title mine")
    say(chat, "hello " * 30)
    assert do(chat, "/title").text == title_of("hello " * 30)
    assert len(title_of("hello " * 30)) <= 60
    do(chat, "/title My talk")
    say(chat, "more")
    assert chat.database.find("My talk").id == chat.saving.session_id
    mine = chat.saving.session_id
    with pytest.raises(UsageError, match="you are in"):
        do(chat, f"/sessions delete {mine}")
    do(chat, "/clear")
    assert chat.database.states.path(mine).is_file()
    say(chat, "another")
    assert [row[0] for row in do(chat, "/sessions").rows] == [chat.saving.session_id[:8], mine[:8]]
    do(chat, f"/sessions delete {mine[:5]}")
    assert [one.id for one in chat.database.sessions()] == [chat.saving.session_id]
    assert not chat.database.states.path(mine).exists()
    assert chat.database.search("hello") == []
    with pytest.raises(UsageError, match="no chat"):
        do(chat, f"/resume {mine}")
    with pytest.raises(UsageError):
        do(chat, "/resume")


def test_old_states_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_states, "_MOST_BYTES", 1000)
    database = ChatDatabase(tmp_path / "chats.sqlite")
    for age, name in ((30, "old"), (20, "newer"), (10, "newest")):
        path = database.states.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(300))
        os.utime(path, (time.time() - age, time.time() - age))
    assert database.states.make_room("mine", 400)
    assert sorted(path.stem for path in database.states.path("x").parent.iterdir()) == ["newer", "newest"]
    assert not database.states.make_room("mine", 1001)
    assert len(list(database.states.path("x").parent.iterdir())) == 2


def test_another_models_tokens_are_not_its_own(chat: OpenChat, session: Session) -> None:
    node = say(chat, "hello")
    other = Conversation(session.engine, tree=chat.conversation.tree, vocabulary="another")
    assert session.vocabulary != "another"
    with pytest.raises(UsageError, match="another vocabulary"):
        other.branch(node.id, 0, node.ids[0])
    encoded = session.engine.tokenizer.encode(node.content, add_special=False)
    ids = other.prompt_ids()
    assert any(ids[at : at + len(encoded)] == encoded for at in range(len(ids)))


def test_choices_survive_packing() -> None:
    choice = TokenChoice(5, 0, 2, 0.5, 0.75, (Candidate(5, "ab", 0.5, 0.75), Candidate(6, "\x1b", 0.25, 0.0)))
    assert unpack_choices(pack_choices([choice])) == [choice]
    assert pack_choices([]) == b""


def test_autosave_writes_in_blocks(session: Session) -> None:
    writes: list[int] = []

    class Counted(ChatDatabase):
        def save(self, session: SavedSession, nodes: Any = (), *, head: str | None) -> None:
            writes.append(len(list(nodes)))
            super().save(session, nodes, head=head)

    conversation = session.converse(sampling=GREEDY, max_tokens=64)
    conversation.recorder = Autosave(session, database=Counted(), clock=lambda: 0.0)
    "".join(conversation.ask("hello"))
    # The question, a block for every 16 tokens, the end.
    assert 4 <= len(writes) <= 7


def test_choices_are_written_once(tmp_path: Path) -> None:
    database = ChatDatabase(tmp_path / "chats.sqlite")
    session, node = SavedSession("a"), Node("assistant", "")
    choices = [TokenChoice(number, number, number + 1, 0.5, 0.5) for number in range(5)]
    for count in (2, 2, 3, 5):
        node.ids, node.choices = tuple(range(count)), choices[:count]
        database.save(session, [node], head=node.id)
    assert database.load("a").nodes[node.id].choices == choices
    with database._file.transaction() as sql:
        blocks = [tuple(row) for row in sql.execute("SELECT start, stop FROM choices ORDER BY start")]
    assert blocks == [(0, 2), (2, 3), (3, 5)]
    database.delete("a")
    with database._file.transaction() as sql:
        assert sql.execute("SELECT count(*) FROM choices").fetchone()[0] == 0
