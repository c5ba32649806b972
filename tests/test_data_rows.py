"""Rows to examples: formats, what is asked of held-out rows, and bad rows named by file and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import Masker, held_out_ids, tokenize
from edgetune.data.formats import Conversation, Pair
from edgetune.data.tokenizer import load_tokenizer
from edgetune.errors import DataError
from edgetune.events import Event, Notice, Progress
from tests.checkpoints import build_bpe_tokenizer
from tests.data_files import CHAT, GOOD, TURNS, examples, read, write_rows


@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(CHAT, "chat messages", id="messages"),
        pytest.param(
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fox"}]},
            "ShareGPT",
            id="sharegpt",
        ),
        pytest.param({"instruction": "hello", "input": "", "output": "fox"}, "Alpaca", id="alpaca"),
        pytest.param({"prompt": "hello", "completion": "fox"}, "prompt/completion", id="pair"),
        pytest.param(
            {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "prompt/completion", id="turn-pair"
        ),
        pytest.param({"question": "hello", "answer": "fox"}, "question/answer", id="question"),
    ],
)
def test_every_format_becomes_the_same_conversation(tmp_path: Path, row: Mapping[str, Any], name: str) -> None:
    said: list[Event] = []
    path = write_rows(tmp_path / "train.jsonl", [row])
    assert examples(path, sink=said.append) == [Conversation(TURNS, (), (False, True))]
    assert any(isinstance(event, Notice) and name in event.text for event in said)


def test_without_a_template_pairs_are_bare_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "hello", "completion": " fox"}])
    assert examples(path, has_template=False) == [Pair("hello", " fox")]
    path = write_rows(tmp_path / "b.jsonl", [{"question": "2+2?", "answer": "4"}])
    assert examples(path, has_template=False) == [Pair("Question: 2+2?\nAnswer:", " 4")]
    with pytest.raises(DataError, match="no chat template") as caught:
        examples(write_rows(tmp_path / "c.jsonl", [CHAT]), has_template=False)
    assert "--chat-template" in caught.value.hint


def test_alpaca_input_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["u1", "a1"], ["u2", "a2"]]}
    (example,) = examples(write_rows(tmp_path / "a.jsonl", [row]))
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == ["s", "u1", "a1", "u2", "a2", "i\n\nx", "o"]


def test_sharegpt_tool_calls(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "find"},
            {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "fox"}}'},
            {"from": "observation", "value": "here"},
            {"from": "gpt", "value": "It is here."},
        ],
        "system": "be kind",
        "tools": '[{"name": "find", "parameters": {}}]',
    }
    (example,) = examples(write_rows(tmp_path / "a.jsonl", [row]))
    assert isinstance(example, Conversation)
    assert example.tools == ({"type": "function", "function": {"name": "find", "parameters": {}}},)
    assert example.learned == (False, False, True, False, True)
    (call,) = example.messages[2]["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": {"what": "fox"}}
    assert example.messages[3]["tool_call_id"] == call["id"]
    assert len(call["id"]) == 9


def test_openai_details(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "r"},
            {"role": "assistant", "content": "no", "weight": 0},
            {"role": "user", "content": "ignored: nothing is learned after it"},
        ]
    }
    (example,) = examples(write_rows(tmp_path / "a.jsonl", [row]))
    assert isinstance(example, Conversation)
    assert example.messages[:2] == ({"role": "system", "content": "s"}, {"role": "user", "content": "ab"})
    assert example.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert example.learned == (False, False, True)


BAD_LINES = [
    pytest.param("{not json", "expected a JSON object", id="broken-json"),
    pytest.param("[1, 2]", "found '\\[1, 2\\]'", id="list"),
    pytest.param('{"text": "x"}', "found the columns text", id="other-format"),
    pytest.param('{"messages": null}', "found the columns messages", id="null"),
    pytest.param('{"messages": []}', "an empty one", id="no-messages"),
    pytest.param('{"messages": "hi"}', "expected a list of messages", id="text-for-messages"),
    pytest.param('{"messages": [{"role": "wizard", "content": "x"}]}', "found 'wizard'", id="role"),
    pytest.param('{"messages": [{"role": "user", "content": 5}]}', "found a number", id="content-type"),
    pytest.param('{"messages": [{"role": "user", "content": "x"}]}', "at least one assistant", id="no-assistant"),
    pytest.param('{"messages": [{"role": "assistant", "content": " "}]}', "content in message 1", id="empty-reply"),
    pytest.param(
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "found a part of type", id="image"
    ),
]


@pytest.mark.parametrize(("line", "found"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_or_skipped(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(DataError, match=found) as caught:
        read(path)
    assert f"{path}, line 3: expected" in caught.value.message
    dataset = read(path, skip_bad_rows=True)
    assert len(dataset.examples["train"]) == 2
    assert len(dataset.skipped.problems) == 1


def test_truncated_and_dropped_sequences_are_counted(tmp_path: Path) -> None:
    build_bpe_tokenizer().save_pretrained(tmp_path / "model")
    long = {"messages": [{"role": "user", "content": "the " * 50}, {"role": "assistant", "content": "fox"}]}
    cut = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the " * 50}]}
    path = write_rows(tmp_path / "a.jsonl", [CHAT, long, cut])
    said: list[Event] = []
    tokenizer = load_tokenizer(tmp_path / "model")
    split = tokenize(read(path), tokenizer, max_length=40, sink=said.append)["train"]
    assert (len(split.sequences), split.truncated, split.dropped) == (2, 2, 1)
    assert any(isinstance(event, Notice) and "2 of 3 sequences cut at 40" in event.text for event in said)


@pytest.mark.parametrize("task", ["chat", "completion"])
def test_many_rows_encoded_together_are_those_encoded_one_by_one(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr("edgetune.data.dataset._ROWS_TOGETHER", 4)
    build_bpe_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    texts = ["fox", "the <|im_end|> dog", "", " lazy\n\n", "jumps <|im_start|>assistant", "the " * 30]
    rows = [{"prompt": f"over {n} {texts[n % 6]}", "completion": f"{texts[n % 5] or 'brown'} {n}"} for n in range(23)]
    said: list[Event] = []
    dataset = read(write_rows(tmp_path / "a.jsonl", rows), task=task)
    split = tokenize(dataset, tokenizer, max_length=56, sink=said.append)["train"]
    masker = Masker(tokenizer, 56)
    alone = [sequence.cut(56) for _, example in dataset.examples["train"] for sequence in masker.sequences(example)]
    kept = [sequence for sequence in alone if sequence.learned[1:].any()]
    assert len(kept) == len(split.sequences) > 15
    for one, other in zip(split.sequences, kept, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.learned.tolist() == other.learned.tolist()
    assert split.rows_of == [n for n, sequence in enumerate(alone) if sequence.learned[1:].any()]
    assert [event.done for event in said if isinstance(event, Progress)] == [4, 8, 12, 16, 20, 23]


def test_a_row_that_the_template_refuses_is_named_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.data.dataset._ROWS_TOGETHER", 3)
    build_bpe_tokenizer().save_pretrained(tmp_path / "model")
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('never') }}{% endif %}"
        "{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = load_tokenizer(tmp_path / "model", chat_template=template)
    path = write_rows(tmp_path / "a.jsonl", [_asked("no" if n in (4, 5, 10) else "yes") for n in range(12)])
    with pytest.raises(DataError, match=r"a\.jsonl, line 5: .*never"):
        tokenize(read(path), tokenizer, max_length=40)
    split = tokenize(read(path, skip_bad_rows=True), tokenizer, max_length=40)["train"]
    assert split.rows_of == [0, 1, 2, 3, 6, 7, 8, 9, 11]
    assert split.rows == 9


def _asked(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "fox"}]}


def test_held_out_rows_come_from_the_validation_file(tmp_path: Path) -> None:
    build_bpe_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", [CHAT] * 3)
    other = {"messages": [{"role": "user", "content": "over"}, {"role": "assistant", "content": "dog"}]}
    write_rows(data / "valid.jsonl", [other] * 3)
    found = held_out_ids(tmp_path / "model", data, limit=2)
    assert len(found) == 2
    assert "over" in load_tokenizer(tmp_path / "model").decode(found[0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "over", "chosen": " dog", "rejected": " fox"},
        {"prompt": "over", "completion": " dog", "label": True},
    ],
)
def test_held_out_preferences_are_prompts_with_the_better_reply(tmp_path: Path, row: dict[str, Any]) -> None:
    build_bpe_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", [{**row, "prompt": "quick"}] * 3)
    write_rows(data / "valid.jsonl", [row, {**row, "prompt": ""}])
    found = held_out_ids(tmp_path / "model", data, limit=9)
    assert [load_tokenizer(tmp_path / "model").decode(ids) for ids in found] == ["over dog<|im_end|>"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param(b'{"prompt": "a", "completion": "\xff"}', "byte 0xff is not valid UTF-8", id="bytes"),
        pytest.param(b'{"prompt": "a", "completion": "\\ud83d"}', "half of a surrogate pair", id="half-a-character"),
    ],
)
def test_text_that_is_no_unicode_spoils_its_row_alone(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    whole = b'{"prompt": "a", "completion": "\\ud83d\\ude00"}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(DataError, match=rf"rows.jsonl, line 2: .*{message}"):
        read(path)
    assert examples(path, skip_bad_rows=True, task="completion") == [Pair("a", "\U0001f600")] * 2


def test_preference_pairs_are_named_whatever_else_they_hold(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}}
    with pytest.raises(DataError, match="preference pairs"):
        read(write_rows(tmp_path / "a.jsonl", [row]))
