"""A row of a chat, files of rows, and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.data import Dataset, read_dataset
from edgetune.data.formats import Example

CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"}]}
TURNS = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "fox"})
GOOD = json.dumps(CHAT)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, *, has_template: bool = True, **options: Any) -> Dataset:
    return read_dataset([path], has_template=has_template, **options)


def examples(path: Path, *, has_template: bool = True, **options: Any) -> list[Example]:
    return [example for _, example in read(path, has_template=has_template, **options).examples["train"]]
