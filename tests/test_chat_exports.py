"""What was said becomes Markdown, training rows, preference pairs and verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.chat import Node, Session, Tree, open_session
from edgetune.chat.exports import chat_rows, export, markdown, preference_pairs, verdict_rows, voted_rows
from edgetune.chat.open_chat import OpenChat
from edgetune.cli.main import run
from edgetune.data.formats import detect_format
from edgetune.data.preferences import preference_task
from edgetune.errors import UsageError
from tests.chats import do, fresh_chat, say
from tests.checkpoints import write_checkpoint
from tests.ggufs import base_gguf


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(base_gguf(), threads=1) as opened:
        yield opened


@pytest.fixture
def chat(session: Session) -> Iterator[OpenChat]:
    with fresh_chat(session) as opened:
        yield opened


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
    verdicts = verdict_rows(tree, system="S")
    assert [(row["messages"][-1]["content"], row["label"]) for row in verdicts] == [
        ("5", False),
        ("4", True),
        ("6", True),
    ]
    assert verdicts[0]["messages"][0] == {"role": "system", "content": "S"}
    text = markdown(tree.path(), title="Sums", system="Be\nright.")
    assert text.startswith("# Sums\n\n> Be\n> right.\n\n## You\n\nWhat is 2 + 2?\n\n## Model\n\n4\n")
    tree.add(Node("user", "unanswered", parent=tree.head))
    assert chat_rows(tree) == [{"messages": row["messages"][1:]}]
    assert chat_rows(Tree()) == voted_rows(Tree()) == preference_pairs(Tree()) == verdict_rows(Tree()) == []
    for exported in (row, four, six):
        found = detect_format(exported)
        assert found
        assert found.read(exported, "chat")


def test_the_exported_rows_are_taken_by_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "base", "llama")
    for kind, count, task in (("jsonl", 1, "chat"), ("rows", 2, "chat"), ("pairs", 1, "dpo"), ("verdicts", 3, "kto")):
        path = tmp_path / f"{kind}.jsonl"
        assert export(path, _voted_tree(), kind=kind, system="Be right.") == count  # type: ignore[arg-type]
        code = run(
            ["train", "-m", str(checkpoint), "-d", str(path), "-o", str(tmp_path / "run"), "--task", task, "--dry-run"]
        )
        assert code == 0, capsys.readouterr().err
        assert preference_task(json.loads(path.read_text().splitlines()[0])) == task.replace("chat", "")


def test_export_by_command(chat: OpenChat, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Nothing was said"):
        do(chat, f"/export {tmp_path / 'a.md'}")
    node = say(chat, "hello")
    do(chat, f"/export {tmp_path / 'a.md'}")
    assert (tmp_path / "a.md").read_text().startswith("# hello\n")
    assert "edgetune train" in do(chat, f"/export {tmp_path / 'a.jsonl'}").text
    assert json.loads((tmp_path / "a.jsonl").read_text())["messages"][1]["content"] == node.content
    for kind in ("rows", "pairs", "verdicts"):
        with pytest.raises(UsageError):
            do(chat, f"/export {kind} {tmp_path / 'b.jsonl'}")
        assert not (tmp_path / "b.jsonl").exists()
    do(chat, "/vote down")
    do(chat, "/edit reply Better.")
    assert do(chat, f"/export pairs {tmp_path / 'b.jsonl'}").text.startswith("1 pair in")
    for bad in ("/export", "/export rows"):
        with pytest.raises(UsageError):
            do(chat, bad)
