"""Files to examples: formats, encodings, and bad rows named by file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import Dataset, Masker, held_out_ids, read_dataset, tokenize
from edgetune.data.formats import Conversation, Document, Example, Pair
from edgetune.data.sources import BadRow, Row, iter_rows
from edgetune.data.tokenizer import load_tokenizer
from edgetune.errors import DataError, UsageError
from edgetune.events import Event, Notice, Progress
from tests.checkpoints import build_bpe_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"}]}
TURNS = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"})


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, *, has_template: bool = True, **options: Any) -> Dataset:
    return read_dataset([path], has_template=has_template, **options)


def examples(path: Path, *, has_template: bool = True, **options: Any) -> list[Example]:
    return [example for _, example in read(path, has_template=has_template, **options).examples["train"]]


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


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_file_types_say_the_same(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f'say {n}, "now"\nplease', "completion": f"é{n}"} for n in range(3)]
    path = tmp_path / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == "jsonl":
        write_rows(path, rows)
    elif suffix == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    wanted = [Pair(row["prompt"], row["completion"]) for row in rows]
    assert examples(path, task="completion") == wanted


def test_text_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n\ntwo", encoding="utf-8")
    assert examples(tmp_path) == [Document("one\n\ntwo")]


GOOD = json.dumps(CHAT)
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


def test_rows_of_a_json_list_have_their_true_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'[\n  {GOOD},\n\n  {{"messages":\n  5}}\n]', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.json, line 4: "):
        read(path)
    path.write_text(f"[\n{GOOD},\n{{oops}}\n]", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.json, line 3: the JSON list is broken"):
        read(path)


@pytest.mark.parametrize(
    ("text", "bad", "good"),
    [
        # Closed by a quote of a later row, by none at all, and badly in its own row.
        ('text,label\na,1\n"b,2\nc,3\n"d",4\n', [3], ["a", "c", "d"]),
        ('text,label\r\na,1\r\n"b,2\r\nc,3\r\n', [3], ["a", "c"]),
        ('text,label\n"x\ny",1\n"a"b,2\nc\nd,4,5\nz,6\n', [4, 5, 6], ["x\ny", "z"]),
        ('text,label\na,1\n"b"c,2', [3], ["a"]),
    ],
)
def test_a_broken_csv_row_is_named_and_those_after_it_are_read(
    text: str, bad: list[int], good: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    rows = list(iter_rows(path))
    assert [row.line for row in rows if isinstance(row, BadRow)] == bad
    assert [row.values["text"] for row in rows if isinstance(row, Row)] == good
    path.write_text('"text,label\na,1\n')
    with pytest.raises(DataError, match=r"rows.csv, line 1: a quote is opened and not closed"):
        list(iter_rows(path))


def test_csv_lines_count_through_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nx\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.csv, line 4: expected 2 columns"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "nothing but white space"),
        (GOOD.encode() + b'\n{"text": "\xff"}\n', "line 2: byte 0xff is not valid UTF-8"),
        (GOOD.encode("utf-16"), "UTF-16"),
        (b'{"foo": 1}\n', "line 1: expected one of"),
        (b'{"prompt": [], "chosen": "a", "rejected": "b"}\n', "preference pairs"),
    ],
)
def test_a_file_that_is_no_dataset(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_splits_of_a_directory(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [CHAT])
    dataset = read(tmp_path, splits=("train", "valid", "test"))
    assert {name: len(rows) for name, rows in dataset.examples.items()} == {"train": 2, "valid": 1, "test": 1}
    with pytest.raises(UsageError, match="There is no data at"):
        read(tmp_path / "nowhere")
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UsageError, match="not a data file"):
        read(tmp_path / "a.docx")


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


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_one_key_of_an_object_have_their_true_line(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "rows.json"
    wrapped = {"version": ["1"], "info": {"n": 2}, "data": [CHAT, CHAT]}
    path.write_text(json.dumps(wrapped, indent=indent), encoding="utf-8")
    assert len(examples(path)) == 2
    text = json.dumps({**wrapped, "data": [CHAT, {"messages": 5}]}, indent=indent)
    path.write_text(text, encoding="utf-8")
    line = text[: text.index('"messages": 5')].rpartition("{")[0].count("\n") + 1
    with pytest.raises(DataError, match=rf"rows.json, line {line}: .* a number"):
        read(path)


def test_one_row_alone_is_a_row_and_no_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    for row in (CHAT, {"prompt": CHAT["messages"][:1], "completion": "fox"}):
        for indent in (None, 1):
            path.write_text(json.dumps(row, indent=indent), encoding="utf-8")
            assert examples(path) == [Conversation(TURNS, (), (False, True))]


def test_nulls_that_parquet_fills_in_are_no_arguments(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    def row(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        call = {"function": {"name": name, "arguments": arguments}}
        return {"messages": [CHAT["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]}]}

    table = pyarrow.Table.from_pylist([row("f", {"a": 1}), row("g", {"b": "x"})])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = [example.messages[1]["tool_calls"] for example in examples(tmp_path) if isinstance(example, Conversation)]
    assert [calls[0]["function"]["arguments"] for calls in found] == [{"a": 1}, {"b": "x"}]


def test_capitals_in_column_names_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Instruction,Input,Output\nhello,,fox\n", encoding="utf-8")
    assert examples(tmp_path / "rows.csv") == [Conversation(TURNS, (), (False, True))]


def test_preference_pairs_are_named_whatever_else_they_hold(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "x"}], "chosen": {}, "rejected": {}}
    with pytest.raises(DataError, match="preference pairs"):
        read(write_rows(tmp_path / "a.jsonl", [row]))


def test_a_split_may_be_the_end_of_a_name_and_is_said(tmp_path: Path) -> None:
    for name in ("mine_train", "mine_val", "latest"):
        write_rows(tmp_path / f"{name}.jsonl", [CHAT])
    said: list[Event] = []
    dataset = read(tmp_path, sink=said.append)
    assert {name: len(rows) for name, rows in dataset.examples.items()} == {"train": 1, "valid": 1}
    assert any(isinstance(event, Notice) and event.text.startswith("valid: ") for event in said)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_gzipped_files_are_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"say {n}", "completion": f"é{n}"} for n in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows) if suffix == "jsonl" else json.dumps(rows)
    if suffix == "csv":
        text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows)
    for name in ("mine_train", "mine_val"):
        (tmp_path / f"{name}.{suffix}.gz").write_bytes(gzip.compress(text.encode()))
    dataset = read(tmp_path, task="completion")
    assert [example for _, example in dataset.examples["train"]] == [
        Pair(row["prompt"], row["completion"]) for row in rows
    ]
    assert [path.name for path in dataset.files["valid"]] == [f"mine_val.{suffix}.gz"]


# A compressed file holds the time it was made at: it is no name for a test.
@pytest.mark.parametrize(
    "content", [b"plain text", gzip.compress(b"x" * 99)[:-9], gzip.compress(b"")], ids=["plain", "cut", "empty"]
)
def test_a_broken_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows.jsonl.gz (is not a readable gzip file|holds nothing)"):
        read(path)


def test_other_compressed_files_are_refused(tmp_path: Path) -> None:
    for name in ("rows.jsonl.zst", "rows.parquet.gz", "rows.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match="is not a data file"):
            read(tmp_path / name)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_file_says_its_delimiter_in_its_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f'"prompt"{delimiter}completion\n"a, b; c\td"{delimiter}fox\n', encoding="utf-8")
    assert examples(path, task="completion") == [Pair("a, b; c\td", "fox")]


def test_folders_of_the_hugging_face_hub(tmp_path: Path) -> None:
    def write(place: str) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / place, [CHAT])

    def counts(place: str) -> dict[str, int]:
        return {name: len(rows) for name, rows in read(tmp_path / place).examples.items()}

    for split in ("train", "validation"):
        write(f"flat/data/{split}-00000-of-00001.jsonl")
        write(f"split/{split}/0000.jsonl")
        write(f"variants/main/{split}-00000-of-00001.jsonl")
    write("flat/extra/notes.jsonl")
    (tmp_path / "flat" / "dataset_infos.json").write_text("{}")
    assert counts("flat") == counts("split") == counts("variants") == {"train": 1, "valid": 1}
    write("variants/socratic/train-00000-of-00001.jsonl")
    with pytest.raises(UsageError, match="several datasets: main, socratic") as caught:
        counts("variants")
    assert f"-d {tmp_path / 'variants' / 'main'}" in caught.value.hint
    (tmp_path / "nothing" / "data").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no data files"):
        counts("nothing")
