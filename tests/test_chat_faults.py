"""Keeping chats on a disk that is full, a file that is damaged, held, removed, and in a process that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.chat import Node, Session, open_session, sqlite_file
from edgetune.chat.database import ChatDatabase, SavedSession
from edgetune.chat.open_chat import OpenChat
from edgetune.errors import CorruptFileError, EdgetuneError, ResourceError
from tests.chats import GREEDY, do, fresh_chat, say
from tests.ggufs import base_gguf


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture
def chat(session: Session) -> Iterator[OpenChat]:
    with fresh_chat(session) as opened:
        yield opened


_KILLED = """
import sys
from pathlib import Path
from edgetune.chat import open_session
from edgetune.chat.open_chat import OpenChat
from edgetune.engine.sampling import Sampling
with open_session(Path(sys.argv[1]), threads=1) as session:
    conversation = session.converse(sampling=Sampling(temp=0, ignore_eos=True), max_tokens=400)
    chat = OpenChat(session, conversation)
    for text in conversation.ask("tell me everything"):
        if len(conversation.tree.path()[-1].ids) >= 48:
            print("now", flush=True)
            sys.stdin.read()
"""


def test_kill_9_in_the_middle_of_a_reply_loses_no_more_than_the_last_block() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(base_gguf())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    with child:
        assert child.stdout
        assert child.stdout.readline() == "now\n"
        os.kill(child.pid, signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    database = ChatDatabase()
    (saved,) = database.sessions()
    tree = database.load(saved.id)
    question, reply = tree.path()
    assert question.content == "tell me everything"
    assert len(reply.ids) >= 48
    assert reply.content
    assert reply.meta["finish_reason"] == "interrupted"
    with open_session(base_gguf(), threads=1) as session, OpenChat(session, session.converse()) as chat:
        do(chat, "/resume")
        # What was saved is what the model says: the tokens of the same greedy reply.
        chat.conversation.max_tokens = len(reply.ids)
        chat.conversation.sampling = GREEDY
        assert do(chat, "/retry").reply is not None
        assert chat.conversation.tree.path()[-1].ids == reply.ids
        assert say(chat, "go on").content


def _full_disk(chat: OpenChat) -> None:
    with chat.database._file.transaction() as sql:
        pages = sql.execute("PRAGMA page_count").fetchone()[0]
        sql.execute(f"PRAGMA max_page_count = {pages}")


def _roomy_disk(chat: OpenChat) -> None:
    with chat.database._file.transaction() as sql:
        sql.execute("PRAGMA max_page_count = 1000000")


def test_a_full_disk_is_told_once_and_nothing_is_lost(session: Session) -> None:
    problems: list[EdgetuneError] = []
    conversation = session.converse(sampling=GREEDY, max_tokens=40, top=10)
    with OpenChat(session, conversation, on_problem=problems.append) as chat:
        say(chat, "hello")
        _full_disk(chat)
        conversation.tree.path()[1].meta["note"] = "x" * 50_000
        conversation.vote(str(conversation.tree.head), "up")
        assert say(chat, "and again").content
        assert say(chat, "and again").content
        assert len(problems) == 1
        assert isinstance(problems[0], ResourceError)
        assert "disk is full" in problems[0].message
        _roomy_disk(chat)
        say(chat, "now")
        assert chat.saving.problem is None
        saved = ChatDatabase().load(chat.saving.session_id)
        assert [node.content for node in saved.path()] == [node.content for node in conversation.tree.path()]
        assert saved.path()[1].meta["vote"] == "up"


@pytest.mark.parametrize("happens", ["removed", "replaced"])
def test_a_file_that_goes_under_a_running_chat_is_written_anew(session: Session, happens: str) -> None:
    problems: list[EdgetuneError] = []
    conversation = session.converse(sampling=GREEDY, max_tokens=40, top=3)
    with OpenChat(session, conversation, on_problem=problems.append) as chat:
        say(chat, "hello")
        for path in chat.database.path.parent.glob("chats.sqlite*"):
            path.unlink()
        if happens == "replaced":
            other = ChatDatabase(chat.database.path)
            other.save(SavedSession("other", "Other"), head=None)
            other.close()
        say(chat, "and again")
        saved = ChatDatabase().load(chat.saving.session_id)
        said = [(node.id, node.content, node.ids) for node in conversation.tree.path()]
        assert [(node.id, node.content, node.ids) for node in saved.path()] == said
        assert all(len(node.choices) == len(node.ids) for node in saved.path() if node.role == "assistant")
        assert [one.title for one in chat.database.sessions()] == ["hello", *["Other"] * (happens == "replaced")]
    assert problems == []


def test_a_state_that_cannot_be_kept_is_no_problem(session: Session, tmp_path: Path) -> None:
    problems: list[EdgetuneError] = []
    database = ChatDatabase(tmp_path / "chats.sqlite")
    (tmp_path / "chats").write_text("in the way")
    conversation = session.converse(sampling=GREEDY, max_tokens=4)
    with OpenChat(session, conversation, database=database, on_problem=problems.append) as chat:
        say(chat, "hello")
    assert problems == []
    assert len(ChatDatabase(database.path).sessions()) == 1


def test_a_file_held_by_another_program(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "_WAIT_S", 0.01)
    problems: list[EdgetuneError] = []
    with OpenChat(session, session.converse(sampling=GREEDY, max_tokens=4), on_problem=problems.append) as chat:
        say(chat, "hello")
        other = sqlite3.connect(chat.database.path)
        other.execute("BEGIN IMMEDIATE")
        assert say(chat, "again").content
        assert "held by another program" in problems[0].message
        other.rollback()
        other.close()
        say(chat, "now")
        assert len(ChatDatabase().load(chat.saving.session_id).nodes) == 6


def test_a_damaged_file_and_one_from_the_future(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "chats.sqlite"
    path.write_bytes(b"this is no database at all" * 400)
    with pytest.raises(CorruptFileError, match="damaged"):
        ChatDatabase(path).sessions()
    problems: list[EdgetuneError] = []
    conversation = session.converse(sampling=GREEDY, max_tokens=4)
    with OpenChat(session, conversation, database=ChatDatabase(path), on_problem=problems.append) as chat:
        assert say(chat, "hello").content
        assert len(problems) == 1
    future = tmp_path / "future.sqlite"
    connection = sqlite3.connect(future)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(EdgetuneError, match="newer"):
        ChatDatabase(future).sessions()
    with pytest.raises(EdgetuneError, match="cannot be"):
        ChatDatabase(tmp_path / "chats.sqlite" / "below.sqlite").save(SavedSession("a"), head=None)


@pytest.mark.skipif(sys.platform == "win32", reason="no such permissions")
def test_nobody_else_reads_what_was_said(chat: OpenChat) -> None:
    say(chat, "hello there, this is between us alone, if you do not mind")
    chat.close()
    assert chat.saving.database.path.stat().st_mode & 0o077 == 0
    state = chat.saving.database.states.path(chat.saving.session_id)
    assert state.is_file()
    assert state.parent.stat().st_mode & 0o077 == 0


def test_two_programs_write_the_same_file(tmp_path: Path) -> None:
    one, two = ChatDatabase(tmp_path / "c.sqlite"), ChatDatabase(tmp_path / "c.sqlite")
    for number in range(10):
        one.save(SavedSession("one"), [Node("user", str(number))], head=None)
        two.save(SavedSession("two"), [Node("user", str(number))], head=None)
    assert {saved.id: saved.messages for saved in one.sessions()} == {"one": 10, "two": 10}
