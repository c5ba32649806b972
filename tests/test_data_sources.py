"""Files to rows: types, encodings, lines, splits of directories, compression."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.formats import Conversation, Document, Pair
from edgetune.data.sources import BadRow, Row, iter_rows
from edgetune.errors import DataError, UsageError
from edgetune.events import Event, Notice
from tests.data_files import CHAT, GOOD, TURNS, examples, read, write_rows


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
