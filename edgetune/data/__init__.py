"""Rows → token ids with a loss mask: sources → formats → masking → dataset.

Imports transformers only to load a tokenizer, and never torch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgetune.data.dataset import Dataset, Split, TrainingSequence, first_row, read_columns, read_dataset, tokenize
from edgetune.data.masking import Masker, Tokenized
from edgetune.data.preferences import judged_rows, paired_rows, preference_task
from edgetune.data.tokenizer import TextTokenizer, load_tokenizer
from edgetune.fingerprint import read_chat_template

__all__ = [
    "Dataset",
    "Masker",
    "Split",
    "TextTokenizer",
    "Tokenized",
    "TrainingSequence",
    "held_out_ids",
    "load_tokenizer",
    "read_dataset",
    "tokenize",
]


def held_out_ids(
    base_dir: Path, data_path: Path | Sequence[Path], *, limit: int, max_length: int = 512
) -> list[list[int]]:
    """Token ids of up to `limit` rows not trained on: validation rows, else test rows, else training rows.

    Rendered and encoded as training does, each cut to `max_length` tokens; bad rows are left out. Of preferences it is
    the prompt with the better reply.
    """
    paths = [data_path] if isinstance(data_path, Path) else list(data_path)
    chat, splits = read_chat_template(base_dir) is not None, ("train", "valid", "test")
    row = first_row(paths)
    if row is not None and (task := preference_task(row)):
        formats = (paired_rows(chat=chat), judged_rows(chat=chat))
        dataset = read_columns(paths, formats, task=task, skip_bad_rows=True, splits=splits)
    else:
        dataset = read_dataset(paths, has_template=chat, skip_bad_rows=True, splits=splits)
    held_out = next(rows for split in ("valid", "test", "train") if (rows := dataset.examples.get(split)))
    rows = [(place, row.answered() if hasattr(row, "answered") else row) for place, row in held_out[:limit]]
    chosen = Dataset({"train": rows}, dataset.files, dataset.formats, dataset.task, "", dataset.skipped)
    split = tokenize(chosen, load_tokenizer(base_dir), max_length=max_length)["train"]
    return [sequence.ids.tolist() for sequence in split.sequences[:limit]]
