"""A dataset, from paths to training sequences: finds the splits, reads and checks every row, masks, cuts, counts.

Two steps, so that bad rows are found before anything heavy is loaded: `read_dataset` needs no tokenizer, `tokenize`
does. Says what it found through a sink; shuffling and batching belong to training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.data.columns import Columns
from edgetune.data.formats import FORMATS, Example, Format, Task, detect_format, present_columns
from edgetune.data.masking import Masker, Tokenized
from edgetune.data.messages import RowError
from edgetune.data.overlap import Overlap, Rows, find_overlap, hold_out
from edgetune.data.sources import BadRow, find_splits, iter_rows, sha256_files
from edgetune.data.tokenizer import TextTokenizer
from edgetune.errors import DataError, EdgetuneError
from edgetune.events import Notice, Progress, Sink, ignore

_ROWS_NAMED = 3
"""How many skipped rows are named; the others are counted."""


@dataclass
class Skipped:
    """Rows that were left out because they are bad."""

    allowed: bool
    """Whether bad rows are skipped; otherwise the first one raises `DataError`."""
    problems: list[str] = field(default_factory=list)

    def add(self, place: str, problem: str) -> None:
        """Record a bad row, or raise `DataError` for it."""
        message = f"{place}: {problem}."
        if not self.allowed:
            raise DataError(message, hint="Correct the row, or leave bad rows out with --skip-bad-rows.")
        self.problems.append(message)


@dataclass(frozen=True)
class Dataset:
    """Checked rows of every split, not tokenized yet."""

    examples: Mapping[str, Sequence[tuple[str, Any]]]
    """Split → (place, example)."""
    files: Mapping[str, Sequence[Path]]
    formats: tuple[str, ...]
    task: str
    sha256: str
    """Over the bytes of all files."""
    skipped: Skipped
    overlap: Overlap = field(default_factory=Overlap)
    """What its splits share."""


class TrainingSequence(Protocol):
    """One example in token ids, as a task makes it."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """What counts for its length: batches are made of sequences of similar length."""
        ...

    @property
    def learned(self) -> NDArray[np.bool_]:
        """For each id, whether the model learns to produce it."""
        ...

    @property
    def learned_count(self) -> int:
        """How many things are learned of it: tokens, or labels."""
        ...


Made = TypeVar("Made", bound=TrainingSequence, covariant=True)


@dataclass(frozen=True)
class Split(Generic[Made]):
    """Training sequences of one split, with what was lost on the way."""

    sequences: Sequence[Made]
    rows: int
    truncated: int = 0
    """Sequences cut at the maximum length."""
    dropped: int = 0
    """Sequences left out because nothing to learn was left of them."""
    rows_of: Sequence[int] | None = None
    """For each sequence, the number of its row, from 0; None where the task does not say."""

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return sum(len(sequence.ids) for sequence in self.sequences)

    @property
    def learned_tokens(self) -> int:
        """Tokens that the loss is over."""
        return sum(sequence.learned_count for sequence in self.sequences)

    def summary(self) -> dict[str, int]:
        """The counts, for records and reports."""
        return {
            "rows": self.rows,
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }


def read_dataset(
    data_paths: Sequence[Path],
    *,
    has_template: bool,
    task: Literal["auto", "chat", "completion"] = "auto",
    skip_bad_rows: bool = False,
    splits: Iterable[str] = ("train", "valid"),
    valid_share: float = 0.0,
    sink: Sink = ignore,
) -> Dataset:
    """Read and check every row of `splits`. Raises `UsageError` or `DataError`, naming file and line.

    `valid_share` of the training rows are held out where there are no validation rows but "valid" is among `splits`.
    """
    skipped = Skipped(skip_bad_rows)
    reader = _TextReader(has_template, task, skipped)
    return _read(reader, data_paths, splits=splits, valid_share=valid_share, sink=sink)


def read_columns(
    data_paths: Sequence[Path],
    formats: Sequence[Columns],
    *,
    task: str,
    skip_bad_rows: bool = False,
    splits: Iterable[str] = ("train", "valid"),
    valid_share: float = 0.0,
    sink: Sink = ignore,
) -> Dataset:
    """Like `read_dataset`, for a task whose rows are in one of `formats`."""
    reader = _ColumnReader(formats, task, Skipped(skip_bad_rows))
    return _read(reader, data_paths, splits=splits, valid_share=valid_share, sink=sink)


def first_row(data_paths: Sequence[Path]) -> Mapping[str, Any] | None:
    """The first readable row of the training data. Raises as `read_dataset` does for files that are none."""
    for path in find_splits(data_paths)["train"]:
        for row in iter_rows(path):
            if not isinstance(row, BadRow):
                return row.values
    return None


def _read(
    reader: _Reader, data_paths: Sequence[Path], *, splits: Iterable[str], valid_share: float, sink: Sink
) -> Dataset:
    wanted, found_files = set(splits), find_splits(data_paths)
    files = {split: paths for split, paths in found_files.items() if split in wanted}
    skipped = reader.skipped
    examples: Mapping[str, Rows] = {
        split: [found for path in paths for found in reader.read(path)] for split, paths in files.items() if paths
    }
    for split, found in examples.items():
        if not found:
            names = ", ".join(str(path) for path in files[split])
            raise DataError(f"{names}: there is no usable row.", hint=_problems(skipped) or reader.expected)
    split_of = {path: split for split, paths in files.items() for path in paths}
    for path, known in reader.formats.items():
        sink(Notice(f"{split_of[path]}: {path}, {known.name} ({known.columns})"))
    if skipped.problems:
        sink(Notice(f"{len(skipped.problems)} bad rows skipped. {_problems(skipped)}", "warning"))
    assert reader.task is not None
    others = {split: reader.read_kindly(paths) for split, paths in found_files.items() if paths and split not in files}
    overlap = find_overlap({**examples, **others}, sink)
    if "valid" in wanted and not files["valid"]:
        examples = _hold_out(examples, valid_share, sink)
    return Dataset(
        examples=examples,
        files=files,
        formats=tuple(dict.fromkeys(known.name for known in reader.formats.values())),
        task=reader.task,
        sha256=sha256_files([path for paths in files.values() for path in paths]),
        skipped=skipped,
        overlap=overlap,
    )


def _hold_out(examples: Mapping[str, Rows], share: float, sink: Sink) -> Mapping[str, Rows]:
    train, valid = hold_out(examples["train"], share)
    if not valid:
        return examples
    sink(Notice(f"valid: {len(valid):,} of the training rows are held out; --valid-share 0 trains on them too."))
    return {**examples, "train": train, "valid": valid}


def tokenize(
    dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink = ignore
) -> dict[str, Split[Tokenized]]:
    """Every split's training sequences, cut to `max_length` tokens. Raises `DataError` for a row it refuses."""
    masker = Masker(tokenizer, max_length)
    before = len(dataset.skipped.problems)
    splits = {
        name: _tokenize_split(name, rows, masker, dataset.skipped, sink) for name, rows in dataset.examples.items()
    }
    for note in masker.notes:
        sink(Notice(note))
    if refused := dataset.skipped.problems[before:]:
        sink(Notice(f"{len(refused)} rows skipped that the chat template does not take. {refused[0]}", "warning"))
    tell_losses(splits, max_length, sink)
    if not splits["train"].sequences:
        raise DataError("Nothing is left to train on: every row was cut before its reply.", hint="Raise --max-length.")
    return splits


def tell_losses(splits: Mapping[str, Split[Any]], max_length: int, sink: Sink) -> None:
    """Say how many sequences were cut or left out, where any were."""
    for name, split in splits.items():
        if split.truncated or split.dropped:
            dropped = f", {split.dropped} left out because nothing to learn was left" if split.dropped else ""
            count = len(split.sequences) + split.dropped
            text = f"{name}: {split.truncated} of {count} sequences cut at {max_length} tokens{dropped}."
            sink(Notice(text, "warning"))


def _tokenize_split(
    name: str, rows: Sequence[tuple[str, Example]], masker: Masker, skipped: Skipped, sink: Sink
) -> Split[Tokenized]:
    sequences: list[Tokenized] = []
    rows_of: list[int] = []
    truncated = dropped = used = 0
    for numbers, made, done in _encoded(rows, masker, skipped):
        used += len(numbers)
        for number, row in zip(numbers, made, strict=True):
            for sequence in row:
                truncated += len(sequence.ids) > masker.max_length
                sequence = sequence.cut(masker.max_length)
                # A token can only be learned where another one comes before it.
                if sequence.learned[1:].any():
                    sequences.append(sequence)
                    rows_of.append(number)
                else:
                    dropped += 1
        sink(Progress("tokenize", done, len(rows), "rows", name))
    return Split(sequences, used, truncated, dropped, rows_of)


_ROWS_TOGETHER = 500
"""Rows whose texts are encoded together, on all cores, while the next ones are rendered."""


def _encoded(
    rows: Sequence[tuple[str, Example]], masker: Masker, skipped: Skipped
) -> Iterator[tuple[list[int], list[list[Tokenized]], int]]:
    """For one stretch of rows after another: usable rows' numbers, what each of them became, and how far it goes."""
    # Else `tokenizers` would write a warning into every process that is started from now on.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with ThreadPoolExecutor(1) as encoder:
        before: tuple[list[int], Future[list[list[Tokenized]]], int] | None = None
        for begin in range(0, len(rows), _ROWS_TOGETHER):
            numbers, drafts = [], []
            end = min(begin + _ROWS_TOGETHER, len(rows))
            for number, (place, example) in enumerate(rows[begin:end], begin):
                try:
                    drafts.append(masker.draft(example))
                except RowError as error:
                    skipped.add(place, str(error))
                    continue
                numbers.append(number)
            if before is not None:
                yield before[0], before[1].result(), before[2]
            before = numbers, encoder.submit(masker.encode, drafts), end
        if before is not None:
            yield before[0], before[1].result(), before[2]


class _Known(Protocol):
    """A format, as far as reading goes."""

    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> str: ...


class _Reader:
    """Reads files row by row; each file's format is what its first readable row shows."""

    expected: str
    """What rows may be, for messages."""

    def __init__(self, skipped: Skipped) -> None:
        self.skipped = skipped
        self.task: str | None = None
        self.formats: dict[Path, _Known] = {}

    def read(self, path: Path) -> Iterable[tuple[str, Any]]:
        """Every usable row of `path` with its place."""
        known: Any = None
        for row in iter_rows(path):
            if isinstance(row, BadRow):
                self.skipped.add(row.place, row.problem)
                continue
            if known is None and (known := self.detect(row.values)) is None:
                self.skipped.add(row.place, f"{self.expected}, found {_columns(row.values)}")
                continue
            if path not in self.formats:
                self.formats[path] = known
                self.settle(path, known)
            try:
                yield row.place, self.convert(known, row.values)
            except RowError as error:
                self.skipped.add(row.place, str(error))

    def read_kindly(self, paths: Iterable[Path]) -> list[tuple[str, Any]]:
        """What is usable of `paths`, which are not what was asked for: what is wrong with them is passed over."""
        before = self.skipped, self.formats, self.task
        self.skipped, self.formats = Skipped(allowed=True), {}
        try:
            return [found for path in paths for found in self.read(path)]
        except EdgetuneError:
            return []
        finally:
            self.skipped, self.formats, self.task = before

    def detect(self, values: Mapping[str, Any]) -> Any:
        """The format of a row; None when it is in none."""
        raise NotImplementedError

    def settle(self, path: Path, known: Any) -> None:
        """Take note that `path` is in format `known`."""

    def convert(self, known: Any, values: Mapping[str, Any]) -> Any:
        """A row's example. Raises `RowError`."""
        raise NotImplementedError


class _ColumnReader(_Reader):
    def __init__(self, formats: Sequence[Columns], task: str, skipped: Skipped) -> None:
        super().__init__(skipped)
        self.known, self.task = formats, task
        self.expected = "expected " + " or ".join(f"{known.name} ({known.columns})" for known in formats)

    def detect(self, values: Mapping[str, Any]) -> Columns | None:
        row = present_columns(values)
        return next((known for known in self.known if known.matches(row)), None)

    def convert(self, known: Columns, values: Mapping[str, Any]) -> Any:
        return known.read(values)


class _TextReader(_Reader):
    def __init__(self, has_template: bool, task: Literal["auto", "chat", "completion"], skipped: Skipped) -> None:
        super().__init__(skipped)
        self.has_template, self.wanted = has_template, task
        self.expected = _KNOWN

    def detect(self, values: Mapping[str, Any]) -> Format | None:
        return detect_format(values)

    def convert(self, known: Format, values: Mapping[str, Any]) -> Example:
        return known.read(values, cast(Task, self.task))

    def settle(self, path: Path, known: Format) -> None:
        task: Task
        if self.wanted == "auto":
            task = "chat" if known.read_chat and (self.has_template or not known.read_completion) else "completion"
        else:
            task = self.wanted
        if task == "chat" and not known.read_chat:
            raise DataError(f"{path} is {known.name}, which has no turns to chat with.", hint="Use --task completion.")
        if task == "completion" and not known.read_completion:
            raise DataError(f"{path} is {known.name}, which needs a chat template.", hint="Use --task chat.")
        if task == "chat" and not self.has_template:
            raise DataError(
                f"{path} is {known.name}, but the model has no chat template to write it with.",
                hint="Give one with --chat-template FILE.jinja; it is kept with the adapter.",
            )
        if self.task not in (None, task):
            raise DataError(
                f"{path} is {known.name} and would be trained as {task}, other files as {self.task}.",
                hint="Say which one with --task, or train on them apart.",
            )
        self.task = task


_KNOWN = "expected one of " + "; ".join(f"{known.name} ({known.columns})" for known in FORMATS)


def _columns(values: Mapping[str, Any]) -> str:
    if "chosen" in values and "rejected" in values:
        return "preference pairs (chosen, rejected), which --task dpo, orpo, simpo and kto learn from"
    return f"the columns {', '.join(map(str, values))}" if values else "an empty object"


def _problems(skipped: Skipped) -> str:
    named = " ".join(skipped.problems[:_ROWS_NAMED])
    more = len(skipped.problems) - _ROWS_NAMED
    return f"{named} (and {more} more)" if more > 0 else named
