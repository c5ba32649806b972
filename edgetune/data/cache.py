"""Training sequences kept on disk: data are tokenized once, and then mapped into memory instead of read.

What is kept is found by the content of all it was made from: the data, the tokenizer, the chat template (and the date,
where the template writes it), the length. Small data are not worth a file. A cache that cannot be written or read is
as good as none; the oldest ones are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import __version__
from edgetune.data.dataset import Dataset, Split, tokenize
from edgetune.data.masking import Tokenized
from edgetune.data.tokenizer import TextTokenizer
from edgetune.errors import EdgetuneError
from edgetune.events import Event, Notice, Sink, ignore
from edgetune.paths import cache_dir, whole_dir

LEAST_ROWS = 1000
"""Data with fewer rows are tokenized anew: it takes about a second."""

KEPT = 8
"""Data sets that are kept."""

MOST_BYTES = 4 << 30
"""What they may take on disk together; the newest one is kept whatever it takes."""

_FORMAT = 2


def cached_tokenize(
    dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int, sink: Sink = ignore
) -> dict[str, Split[Tokenized]]:
    """`tokenize`, or what it made of the same data before. Raises `DataError`."""
    rows = sum(len(examples) for examples in dataset.examples.values())
    if rows < LEAST_ROWS or not dataset.sha256:
        return tokenize(dataset, tokenizer, max_length=max_length, sink=sink)
    directory = cache_dir() / "tokens" / _key(dataset, tokenizer, max_length)
    if (found := _read(directory)) is not None:
        splits, notes = found
        for text, level in notes:
            sink(Notice(text, "warning" if level == "warning" else "info"))
        return splits
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
    return splits


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
        tokenizer.backend.to_str(),
        sorted(tokenizer.control_ids.items()),
        sorted(tokenizer.eog_ids),
        tokenizer.eos_id,
        [template.source, template.tool_source, sorted(template.special_tokens.items())] if template else None,
        date,
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(directory: Path, splits: Mapping[str, Split[Tokenized]], notices: Sequence[tuple[str, str]]) -> None:
    with whole_dir(directory) as partial:
        for name, split in splits.items():
            np.save(partial / f"{name}.ids.npy", np.concatenate([sequence.ids for sequence in split.sequences]))
            learned = np.concatenate([sequence.learned for sequence in split.sequences])
            np.save(partial / f"{name}.learned.npy", learned)
            lengths = np.array([len(sequence.ids) for sequence in split.sequences], dtype=np.int64)
            np.save(partial / f"{name}.lengths.npy", lengths)
            np.save(partial / f"{name}.rows.npy", np.array(split.rows_of, dtype=np.int64))
        counts = {name: [split.rows, split.truncated, split.dropped] for name, split in splits.items()}
        (partial / "splits.json").write_text(json.dumps({"counts": counts, "notices": notices}), encoding="utf-8")
    _remove_old(directory.parent)


def _remove_old(home: Path) -> None:
    newest_first = sorted(home.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for number, kept in enumerate(newest_first):
        total += sum(path.stat().st_size for path in kept.iterdir())
        if number and (number >= KEPT or total > MOST_BYTES):
            shutil.rmtree(kept, ignore_errors=True)


def _read(directory: Path) -> tuple[dict[str, Split[Tokenized]], list[tuple[str, str]]] | None:
    try:
        record = json.loads((directory / "splits.json").read_text(encoding="utf-8"))
        splits = {name: _read_split(directory, name, *counts) for name, counts in record["counts"].items()}
        directory.touch()
        return splits, [(text, level) for text, level in record["notices"]]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _read_split(directory: Path, name: str, rows: int, truncated: int, dropped: int) -> Split[Tokenized]:
    arrays: list[Any] = [
        np.load(directory / f"{name}.{part}.npy", mmap_mode="r") for part in ("ids", "learned", "lengths", "rows")
    ]
    ids, learned, lengths, rows_of = arrays
    ends = np.cumsum(lengths).tolist()
    if not ends or not (ends[-1] == len(ids) == len(learned) and len(rows_of) == len(ends)):
        raise ValueError("the arrays do not fit together")
    sequences = [Tokenized(ids[begin:end], learned[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
    return Split(sequences, rows, truncated, dropped, rows_of.tolist())
