"""Training sequences kept on disk: data are tokenized once, and then mapped into memory instead of read.

What is kept is found by the content of all it was made from: the data, the tokenizer, the chat template (and the date,
where the template writes it), the length. Small data are not worth a file. A cache that cannot be written or read is
as good as none; the oldest ones are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from edgetune import __version__
from edgetune.data.dataset import Dataset, Split, tokenize
from edgetune.data.masking import Tokenized
from edgetune.data.tokenizer import TextTokenizer
from edgetune.errors import EdgetuneError
from edgetune.events import Event, Notice, Sink, ignore
from edgetune.paths import cache_dir, check_disk_space, whole_dir

LEAST_ROWS = 1000
"""Data with fewer rows are tokenized anew: it takes about a second."""

KEPT = 8
"""Data sets that are kept."""

MOST_BYTES = 4 << 30
"""What they may take on disk together; the newest one is kept whatever it takes."""

_BYTES_PER_TOKEN = 5
"""An id and whether it is learned."""

_SILENT_SECONDS = 2.0
"""Another process is waited for so long before that is said."""

_FORMAT = 3


def cached_tokenize(
    dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink = ignore
) -> dict[str, Split[Tokenized]]:
    """`tokenize`, or what it made of the same data before. Raises `DataError`."""
    rows = sum(len(examples) for examples in dataset.examples.values())
    if rows < LEAST_ROWS or not dataset.sha256:
        return tokenize(dataset, tokenizer, max_length=max_length, sink=sink)
    directory = cache_dir() / "tokens" / _key(dataset, tokenizer, max_length)
    with _alone(directory, sink):
        return _found(directory, sink) or _made(directory, dataset, tokenizer, max_length, sink)


def _found(directory: Path, sink: Sink) -> dict[str, Split[Tokenized]] | None:
    if (found := _read(directory)) is None:
        return None
    splits, notes = found
    for text, level in notes:
        sink(Notice(text, "warning" if level == "warning" else "info"))
    return splits


def _made(
    directory: Path, dataset: Dataset, tokenizer: TextTokenizer, max_length: int, sink: Sink
) -> dict[str, Split[Tokenized]]:
    skipped, notices = len(dataset.skipped.problems), list[tuple[str, str]]()

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append((event.text, event.level))
        sink(event)

    splits = tokenize(dataset, tokenizer, max_length=max_length, sink=note)
    # Rows refused here are counted in the run record: they have to be found again.
    if len(dataset.skipped.problems) == skipped:
        with suppress(OSError, EdgetuneError):
            _write(directory, splits, notices)
            if (found := _read(directory)) is not None:
                return found[0]  # in the file, where they take no memory
    return splits


@contextmanager
def _alone(directory: Path, sink: Sink) -> Iterator[None]:
    """Let processes that want the same sequences, as those of one `torchrun` do, make them one after another.

    The second one finds what the first one kept. Where nothing can be locked, nobody waits.
    """
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            _lock_path(directory).parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(_lock_path(directory))
            try:
                lock.acquire(timeout=_SILENT_SECONDS)
            except Timeout:
                sink(Notice("Another process tokenizes the same data: waiting for it."))
                lock.acquire()
            held.callback(lock.release)
        yield


def _lock_path(directory: Path) -> Path:
    return directory.parent.with_name("locks") / directory.name


def _key(dataset: Dataset, tokenizer: TextTokenizer, max_length: int) -> str:
    template = tokenizer.chat_template
    writes_date = template is not None and "strftime_now" in template.source + template.tool_source
    date = str((template.now or datetime.now()).date()) if template is not None and writes_date else ""
    parts = [
        _FORMAT,
        __version__,
        dataset.sha256,
        dataset.task,
        list(dataset.formats),
        {split: [str(path.name) for path in paths] for split, paths in dataset.files.items()},
        {split: len(examples) for split, examples in dataset.examples.items()},
        max_length,
        tokenizer.identity,
        sorted(tokenizer.control_ids.items()),
        sorted(tokenizer.eog_ids),
        tokenizer.eos_id,
        [template.source, template.tool_source, sorted(template.special_tokens.items())] if template else None,
        date,
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(directory: Path, splits: Mapping[str, Split[Tokenized]], notices: Sequence[tuple[str, str]]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(directory.parent, sum(_BYTES_PER_TOKEN * split.tokens for split in splits.values()))
    with whole_dir(directory) as partial:
        for name, split in splits.items():
            sequences, tokens = split.sequences, split.tokens
            _write_array(partial / f"{name}.ids.npy", np.int32, tokens, (one.ids for one in sequences))
            _write_array(partial / f"{name}.learned.npy", np.bool_, tokens, (one.learned for one in sequences))
            np.save(partial / f"{name}.lengths.npy", np.array([len(one.ids) for one in sequences], dtype=np.int64))
            np.save(partial / f"{name}.rows.npy", np.array(split.rows_of, dtype=np.int64))
        counts = {name: [split.rows, split.truncated, split.dropped] for name, split in splits.items()}
        (partial / "splits.json").write_text(json.dumps({"counts": counts, "notices": notices}), encoding="utf-8")
    _remove_old(directory.parent)


def _write_array(path: Path, dtype: Any, count: int, parts: Iterable[NDArray[Any]]) -> None:
    """Write `parts` as one array of `count` values, which is never in memory as a whole."""
    with path.open("wb") as file:
        head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, head)
        for part in parts:
            file.write(part.astype(dtype, copy=False).tobytes())


def _remove_old(home: Path) -> None:
    newest_first = sorted(home.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for number, kept in enumerate(newest_first):
        total += sum(path.stat().st_size for path in kept.iterdir())
        if number and (number >= KEPT or total > MOST_BYTES):
            shutil.rmtree(kept, ignore_errors=True)
            _lock_path(kept).unlink(missing_ok=True)


def _read(directory: Path) -> tuple[dict[str, Split[Tokenized]], list[tuple[str, str]]] | None:
    try:
        record = json.loads((directory / "splits.json").read_text(encoding="utf-8"))
        splits = {name: _read_split(directory, name, *counts) for name, counts in record["counts"].items()}
        with suppress(OSError):  # a home that can be read alone
            directory.touch()
        return splits, [(text, level) for text, level in record["notices"]]
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _read_split(directory: Path, name: str, rows: int, truncated: int, dropped: int) -> Split[Tokenized]:
    arrays: list[Any] = [
        np.load(directory / f"{name}.{part}.npy", mmap_mode="r") for part in ("ids", "learned", "lengths", "rows")
    ]
    ids, learned, lengths, rows_of = arrays
    if not len(lengths) or not (lengths.sum() == len(ids) == len(learned) and len(rows_of) == len(lengths)):
        raise ValueError("the arrays do not fit together")
    ends = np.cumsum(np.concatenate(([0], lengths)))
    # As plain arrays: slices of mapped ones cost ten times as much.
    sequences = _Kept(np.asarray(ids), np.asarray(learned), ends)
    return Split(sequences, rows, truncated, dropped, rows_of.tolist())


@dataclass(frozen=True)
class _Kept(Sequence[Tokenized]):
    """Sequences one after another in two arrays; each exists while it is looked at."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    ends: NDArray[np.int64]
    """(sequences + 1,): where each begins, and the last one ends."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Tokenized: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tokenized]: ...

    def __getitem__(self, index: int | slice) -> Tokenized | list[Tokenized]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        here = slice(int(self.ends[at]), int(self.ends[at + 1]))
        return Tokenized(self.ids[here], self.learned[here])
