"""Kept chats: written as they run, found again, resumed after a crash or with their KV state, exported."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.chat import Conversation, Node, Session, Tree, kv_states, open_session, sqlite_file
from edgetune.chat.autosave import Autosave
from edgetune.chat.commands import COMMANDS, commands_page, run_command
from edgetune.chat.database import ChatDatabase, SavedSession, title_of
from edgetune.chat.exports import chat_rows, export, markdown, preference_pairs, voted_rows
from edgetune.chat.node_values import pack_choices, unpack_choices
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.cli.main import run
from edgetune.data.formats import detect_format
from edgetune.engine.protocol import Candidate, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import CorruptFileError, EdgetuneError, ResourceError, UsageError
from tests.checkpoints import write_checkpoint
from tests.ggufs import base_gguf, lora_gguf

GREEDY = Sampling(temp=0, ignore_eos=True)


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture
def chat(session: Session) -> Iterator[OpenChat]:
    session.engine.set_adapters([])
    session.engine.forget()
    conversation = session.converse(sampling=GREEDY, max_tokens=12, top=3)
    with OpenChat(session, conversation) as opened:
        yield opened


def say(chat: OpenChat, text: str) -> Node:
    reply = chat.say(text)
    "".join(reply)
    return reply.node


def do(chat: OpenChat, line: str) -> Outcome:
    outcome = run_command(chat, line)
    if outcome.reply is not None:
        "".join(outcome.reply)
    return outcome


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


def _voted_tree() -> Tree:
    tree = Tree()
    asked = tree.add(Node("user", "What is 2 + 2?"))
    wrong = tree.add(Node("assistant", "5", parent=asked.id, meta={"vote": "down", "reasoning": "hm"}))
    tree.add(Node("assistant", "22", parent=asked.id))
    right = tree.add(Node("assistant", "4", parent=asked.id, meta={"edited_from": wrong.id}))
    more = tree.add(Node("user", "And 3 + 3?", parent=right.id))
    tree.add(Node("assistant", "6", parent=more.id, meta={"vote": "up"}))
    return tree


def test_exports() -> None:
    tree = _voted_tree()
    (row,) = chat_rows(tree, system="Be right.")
    assert [message["content"] for message in row["messages"]] == [
        "Be right.",
        "What is 2 + 2?",
        "4",
        "And 3 + 3?",
        "6",
    ]
    four, six = voted_rows(tree)
    assert [message["content"] for message in four["messages"]] == ["What is 2 + 2?", "4"]
    assert [message.get("weight") for message in six["messages"]] == [None, 0, None, None]
    assert preference_pairs(tree, system="S") == [
        {
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "What is 2 + 2?"}],
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        }
    ]
    text = markdown(tree.path(), title="Sums", system="Be\nright.")
    assert text.startswith("# Sums\n\n> Be\n> right.\n\n## You\n\nWhat is 2 + 2?\n\n## Model\n\n4\n")
    tree.add(Node("user", "unanswered", parent=tree.head))
    assert chat_rows(tree) == [{"messages": row["messages"][1:]}]
    assert chat_rows(Tree()) == voted_rows(Tree()) == preference_pairs(Tree()) == []
    for exported in (row, four, six):
        found = detect_format(exported)
        assert found
        assert found.read(exported, "chat")


def test_the_exported_rows_are_taken_by_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "base", "llama")
    for kind in ("jsonl", "rows"):
        path = tmp_path / f"{kind}.jsonl"
        tree = _voted_tree()
        assert export(path, tree, kind=kind, system="Be right.") == (1 if kind == "jsonl" else 2)
        code = run(["train", "-m", str(checkpoint), "-d", str(path), "-o", str(tmp_path / "run"), "--dry-run"])
        assert code == 0, capsys.readouterr().err


def test_export_by_command(chat: OpenChat, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Nothing was said"):
        do(chat, f"/export {tmp_path / 'a.md'}")
    node = say(chat, "hello")
    do(chat, f"/export {tmp_path / 'a.md'}")
    assert (tmp_path / "a.md").read_text().startswith("# hello\n")
    assert "edgetune train" in do(chat, f"/export {tmp_path / 'a.jsonl'}").text
    assert json.loads((tmp_path / "a.jsonl").read_text())["messages"][1]["content"] == node.content
    for kind in ("rows", "pairs"):
        with pytest.raises(UsageError):
            do(chat, f"/export {kind} {tmp_path / 'b.jsonl'}")
        assert not (tmp_path / "b.jsonl").exists()
    do(chat, "/vote down")
    do(chat, "/edit reply Better.")
    assert do(chat, f"/export pairs {tmp_path / 'b.jsonl'}").text.startswith("1 pair in")
    for bad in ("/export", "/export rows"):
        with pytest.raises(UsageError):
            do(chat, bad)


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


def test_the_table_of_commands_is_a_page() -> None:
    page = commands_page()
    for command in COMMANDS:
        assert f"`/{command.name}" in page
    assert len({command.name for command in COMMANDS}) == len(COMMANDS)
