"""Files on disk → raw rows, each with the place it came from. The data path's first step; `formats` gives them meaning.

Reads JSONL, JSON lists, CSV/TSV, Parquet and plain text, all but Parquet also gzipped, alone or in a directory with
train/valid/test files (or folders, as datasets of the Hugging Face hub have them). A row that cannot be read is handed
on as a `BadRow` with its true line: the caller decides whether to stop or to skip it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgetune.errors import DataError, UsageError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""File types that can be read; all but Parquet also with .gz behind."""

_SPLIT_WORDS = {"train": "train|training", "valid": "valid|validation|val|dev|eval", "test": "test|testing"}
_SPLIT_NAMES = {
    # "train", "train-00000-of-00002", "gsm8k_train"
    name: re.compile(rf"({words})([-_.].*)?|.*[-_.]({words})", re.IGNORECASE)
    for name, words in _SPLIT_WORDS.items()
}
_ROW_COLUMNS = {
    *("messages", "conversations", "conversation", "prompt", "instruction", "question", "text"),
    *("sentence", "sentence1", "text_a", "premise", "source", "translation", "anchor", "label"),
}
"""A JSON object with one of these is a row itself, not a wrapper of rows."""

_NO_DATA = ("readme", "license", "dataset_info", "dataset_infos", "dataset_dict", "state")
"""Files that lie beside data."""

_EXPECTED = f"Expected one of {', '.join(SUFFIXES)}, or one of these but Parquet with .gz behind."

_BLANK = re.compile(r"[ \t\r\n]*")
_LARGEST_FIELD = 1 << 30
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MAYBE_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Row:
    """One record of a file, as parsed."""

    path: Path
    line: int
    """Where the record starts, from 1; in Parquet the row's number."""
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, {'row' if _file_type(self.path) == '.parquet' else 'line'} {self.line}"


@dataclass(frozen=True)
class BadRow:
    """A record that could not be parsed, and why."""

    path: Path
    line: int
    problem: str

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, line {self.line}"


def find_splits(data_paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of "train", "valid" and "test" among `data_paths`: files, or one directory that holds them.

    A directory without files named after a split is all training data. Raises `UsageError` when nothing is there.
    """
    named: dict[Path, str | None] = {}
    for path in data_paths:
        if path.is_dir():
            named |= _data_files(path)
        elif path.is_file():
            named[_known(path)] = _split_of(_stem(path))
        else:
            raise UsageError(f"There is no data at {path}.", hint="Give a file, or a directory with train.jsonl in it.")
    files = list(named)
    splits = {name: [path for path in files if named[path] == name] for name in _SPLIT_NAMES}
    unnamed = [path for path in files if named[path] is None]
    if not splits["train"]:
        # Files given by name are training data whatever they are called, unless others are named as such.
        alone = len(files) == 1
        splits = {"train": files, "valid": [], "test": []} if alone else {**splits, "train": unnamed}
    elif not all(path.is_dir() for path in data_paths):
        splits["train"] += unnamed
    if not splits["train"]:
        raise UsageError(
            f"No training data among {', '.join(path.name for path in files)}.", hint="Name a file train.jsonl."
        )
    return splits


def sha256_files(paths: Sequence[Path]) -> str:
    """One SHA-256 over the bytes of `paths`, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def iter_rows(path: Path) -> Iterator[Row | BadRow]:
    """Every record of `path`. Raises `DataError` when the whole file cannot be read (empty, not UTF-8, damaged)."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.", hint="Give a file with at least one row.")
    suffix = _file_type(path)
    if suffix == ".parquet":
        return _iter_parquet(path)
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} holds nothing but white space.", hint="Give a file with at least one row.")
    rows: Iterator[Row | BadRow]
    if suffix == ".txt":
        rows = iter([Row(path, 1, {"text": text})])
    elif suffix in (".csv", ".tsv"):
        rows = _iter_csv(path, text, "\t" if suffix == ".tsv" else "")
    else:
        rows = _iter_json_list(path, text, text.index("[")) if _is_json_list(text) else _iter_jsonl(path, text)
    return map(_checked_text, rows) if _MAYBE_SURROGATE.search(text) else rows


def _data_files(directory: Path) -> dict[Path, str | None]:
    """The data files of `directory` and the split that each is of, where its name says one."""
    files = _own_files(directory)
    if not files:
        # A dataset of the Hugging Face hub: all in data/, a folder a split, or a folder a variant.
        folders = {path: found for path in sorted(directory.iterdir()) if path.is_dir() and (found := _own_files(path))}
        if any(_split_of(path.name) == "train" for path in folders):
            return {path: _split_of(folder.name) for folder, found in folders.items() for path in found}
        if len(folders) > 1 and directory / "data" not in folders:
            names, first = ", ".join(path.name for path in folders), next(iter(folders))
            raise UsageError(f"{directory} holds several datasets: {names}.", hint=f"Give one of them: -d {first}")
        files = folders.get(directory / "data") or [path for found in folders.values() for path in found]
    if not files:
        raise UsageError(f"{directory} holds no data files.", hint=_EXPECTED)
    return {path: _split_of(_stem(path)) for path in files}


def _own_files(directory: Path) -> list[Path]:
    files = sorted(path for path in directory.iterdir() if path.is_file() and _file_type(path) in SUFFIXES)
    return [path for path in files if _stem(path).lower() not in _NO_DATA]


def _known(path: Path) -> Path:
    if _file_type(path) not in SUFFIXES:
        raise UsageError(f"{path} is not a data file edgetune reads.", hint=_EXPECTED)
    return path


def _file_type(path: Path) -> str:
    """The suffix in lower case, .gz put aside where what is under it can be read."""
    inner = Path(path.stem).suffix.lower()
    zipped = path.suffix.lower() == ".gz" and inner != ".parquet"
    return inner if zipped else path.suffix.lower()


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _split_of(name: str) -> str | None:
    return next((split for split, pattern in _SPLIT_NAMES.items() if pattern.fullmatch(name)), None)


def _read_text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}.", hint="Write it again.") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}, line 1: the text is UTF-16, expected UTF-8.", hint="Save the file as UTF-8.")
    # What is no UTF-8 becomes a lone surrogate, for which its row alone is refused.
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _checked_text(row: Row | BadRow) -> Row | BadRow:
    """`row`, or why its text is none: bytes that are no UTF-8, or half of a surrogate pair written as an escape."""
    if isinstance(row, BadRow):
        return row
    found = _SURROGATE.search(json.dumps(row.values, ensure_ascii=False))
    if found is None:
        return row
    code = ord(found.group())
    if 0xDC80 <= code <= 0xDCFF:
        return BadRow(row.path, row.line, f"byte 0x{code - 0xDC00:02x} is not valid UTF-8 (save the file as UTF-8)")
    return BadRow(row.path, row.line, f"expected whole characters, found half of a surrogate pair (\\u{code:04x})")


def _is_json_list(text: str) -> bool:
    start = text.lstrip()
    if not start.startswith("["):
        return False
    first_line = start.split("\n", 1)[0].strip()
    # Lines that are each a list are JSONL with bad rows, not one list.
    return first_line in ("[", "[{") or not first_line.endswith("]") or "\n" not in start.strip()


def _iter_jsonl(path: Path, text: str) -> Iterator[Row | BadRow]:
    if (whole := _single_object(text)) is not None:
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) == 1 and not _ROW_COLUMNS & {name.lower() for name in whole}:
            yield from _iter_json_list(path, text, _list_position(text))
        else:
            yield Row(path, text.count("\n", 0, text.index("{")) + 1, whole)
        return
    # Only "\n" ends a line: JSON strings may hold U+2028 and its like.
    for line, record in enumerate(text.split("\n"), 1):
        if record.strip():
            yield _parse(path, line, record)


def _single_object(text: str) -> dict[str, Any] | None:
    """The one JSON object that fills `text`; None when it is anything else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _list_position(text: str) -> int:
    """Where the first list of objects in the JSON object that fills `text` opens."""
    decoder = json.JSONDecoder()
    position = text.index("{")
    while True:
        _, position = decoder.raw_decode(text, text.index('"', position))
        position = _BLANK.match(text, text.index(":", position) + 1).end()  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, position)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return position
        position = end


def _parse(path: Path, line: int, record: str) -> Row | BadRow:
    try:
        value = json.loads(record)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return BadRow(path, line, f"expected a JSON object, found {_shorten(record)} ({reason})")
    return Row(path, line, value) if isinstance(value, dict) else BadRow(path, line, _not_an_object(value))


def _iter_json_list(path: Path, text: str, opens: int) -> Iterator[Row | BadRow]:
    """The records of the JSON list whose bracket is at `opens`."""
    decoder = json.JSONDecoder()
    position = opens + 1
    line, counted = text.count("\n", 0, position) + 1, position
    expect_value = False
    while True:
        position = _BLANK.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and not expect_value:
            return
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            here = text.count("\n", 0, at) + 1
            # What follows a syntax error cannot be told apart any more: the file, not the row, is bad.
            raise DataError(
                f"{path}, line {here}: the JSON list is broken here: {_shorten(text[at:])}.", hint="Repair the file."
            ) from error
        yield Row(path, line, value) if isinstance(value, dict) else BadRow(path, line, _not_an_object(value))
        position = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        expect_value = text[position : position + 1] == ","
        if expect_value:
            position += 1
        elif text[position : position + 1] != "]":
            here = text.count("\n", 0, position) + 1
            raise DataError(f"{path}, line {here}: expected ',' or ']' in the JSON list.", hint="Repair the file.")


def _iter_csv(path: Path, text: str, delimiter: str) -> Iterator[Row | BadRow]:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = delimiter or max(",;\t", key=header.count)
    csv.field_size_limit(_LARGEST_FIELD)
    lines = list(io.StringIO(text, newline=""))
    names: list[str] | None = None
    begin = 0
    while begin < len(lines):
        reader = csv.reader(islice(lines, begin, None), delimiter=delimiter, strict=True)
        line, first = begin + 1, begin + 1
        try:
            for cells in reader:
                start, line = line, first + reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if names is None:
                    names = _column_names(path, start, cells)
                elif len(cells) != len(names):
                    yield BadRow(path, start, f"expected {len(names)} columns ({', '.join(names)}), found {len(cells)}")
                else:
                    yield Row(path, start, dict(zip(names, cells, strict=True)))
            return
        except csv.Error as error:
            is_open = "unexpected end" in str(error)
            problem = "a quote is opened and not closed" if is_open else f"broken CSV: {error}"
            if names is None:
                raise DataError(f"{path}, line {line}: {problem}.", hint="Repair the file.") from error
            yield BadRow(path, line, problem)
            # A quote that is not closed swallows the rows after it; they are read again without it.
            begin = line


def _column_names(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if wrong := _SURROGATE.search("".join(names)):
        found = f"byte 0x{ord(wrong.group()) & 0xFF:02x} is not valid UTF-8"
        raise DataError(f"{path}, line {line}: {found}.", hint="Save the file as UTF-8.")
    return names


def _iter_parquet(path: Path) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("Parquet files need pyarrow.", hint="pip install 'edgetune[train]'") from error
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(path, number, _without_fill(values))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}.", hint="Write it again.") from error


def _without_fill(value: Any) -> Any:
    """`value` without the nulls that a columnar file puts where a record lacks a field that others have."""
    if isinstance(value, dict):
        return {key: _without_fill(item) for key, item in value.items() if item is not None}
    return [_without_fill(item) for item in value] if isinstance(value, list) else value


def _not_an_object(value: Any) -> str:
    return f"expected a JSON object, found {_shorten(json.dumps(value, ensure_ascii=False))}"


def _shorten(text: str) -> str:
    line = " ".join(text[:200].split())
    return repr(line[:60] + "…") if len(line) > 60 or len(text) > 200 else repr(line)
