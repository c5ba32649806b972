"""What a person gives `embed` and `classify` to read: texts as arguments, lines of standard input, rows of files.

A row that cannot be read names its file and line, and stops everything unless bad rows are to be skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.cli.progress import say
from edgetune.cli.terminal import read_stdin, valid_text
from edgetune.errors import DataError, UsageError

TEXT_COLUMNS = (
    *("text", "sentence", "content", "input", "document", "passage", "query", "question", "source", "article"),
)
PAIR_COLUMNS = (
    ("text_a", "text_b"), ("sentence1", "sentence2"), ("sentence_a", "sentence_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("text1", "text2"), ("question", "sentence"), ("question", "context"),
    ("query", "passage"), ("query", "document"),
)  # fmt: skip
_LINES = (".txt",)
_MOST_TOLD = 5


@dataclass(frozen=True)
class TextRow:
    """A text, or two that belong together, and where it stood."""

    place: str
    text: str | tuple[str, str]

    def values(self) -> dict[str, str]:
        """As columns of an output row."""
        if isinstance(self.text, str):
            return {"text": self.text}
        return {"text_a": self.text[0], "text_b": self.text[1]}


def read_rows(arguments: Sequence[str], *, pair: bool = False, skip_bad: bool = False) -> list[TextRow]:
    """The texts that `arguments` mean: TEXT, the path of a file, or `-` for lines of standard input; none is `-`.

    `pair` wants two texts a row: two arguments, two columns, or a tab within a line. Raises `DataError` for a bad row
    unless `skip_bad`, `UsageError` where nothing is left.
    """
    if not arguments and sys.stdin.isatty():
        raise UsageError("There is no text.", hint="Give a text, a file, or - for standard input.")
    rows: list[TextRow] = []
    skipped = 0
    for found in _iter_rows(arguments or ("-",), pair=pair):
        if isinstance(found, TextRow):
            rows.append(found)
            continue
        if not skip_bad:
            raise DataError(found, hint="Repair it, or leave such rows out with --skip-bad.")
        skipped += 1
        if skipped <= _MOST_TOLD:
            say(f"skipped: {found}", warning=True)
    if skipped > _MOST_TOLD:
        say(f"skipped: {skipped} rows in all", warning=True)
    if not rows:
        raise UsageError("There is no text to read.", hint="Give a text, a file, or - for standard input.")
    return rows


def _iter_rows(arguments: Sequence[str], *, pair: bool) -> Iterator[TextRow | str]:
    """Rows, and of bad ones what is wrong with them."""
    if pair and len(arguments) == 2 and not any(_file(argument) or argument == "-" for argument in arguments):
        yield _row("the pair", (valid_text(arguments[0]), valid_text(arguments[1])))
        return
    for number, argument in enumerate(arguments, 1):
        if argument == "-":
            yield from _lines("standard input", read_stdin(), pair=pair)
        elif path := _file(argument):
            yield from _file_rows(path, pair=pair)
        elif pair:
            raise UsageError("--pair takes two texts, a file, or - with a tab between the texts of a line.")
        else:
            yield _row(f"text {number}", valid_text(argument))


def _file(argument: str) -> Path | None:
    """The file that an argument means; a text is not taken for one because it ends like one."""
    from edgetune.data.sources import SUFFIXES

    try:
        path = Path(argument)
        if path.is_file():
            return path
    except (OSError, ValueError):  # too long for a name, or with a character no name has
        return None
    if path.suffix.lower() in SUFFIXES and len(argument.split()) == 1:
        raise UsageError(f"There is no file {argument}.", hint="Check the path.")
    return None


def _file_rows(path: Path, *, pair: bool) -> Iterator[TextRow | str]:
    from edgetune.data.sources import SUFFIXES, BadRow, iter_rows

    suffixes = [suffix.lower() for suffix in path.suffixes]
    if not any(suffix in SUFFIXES for suffix in suffixes[-2:]) or suffixes[-1] in _LINES:
        raw = path.read_bytes()
        yield from _lines(str(path), raw.decode("utf-8-sig", "surrogateescape").removesuffix("\n"), pair=pair)
        return
    for row in iter_rows(path):
        if isinstance(row, BadRow):
            yield f"{row.place}: {row.problem}."
        else:
            yield _columns(row.place, row.values, pair=pair)


def _lines(where: str, text: str, *, pair: bool) -> Iterator[TextRow | str]:
    for number, line in enumerate(text.split("\n") if text else (), 1):
        line, place = line.removesuffix("\r"), f"{where}, line {number}"
        if pair and line.count("\t") != 1:
            yield f"{place}: expected two texts with a tab between them."
        else:
            first, _, second = line.partition("\t")
            yield _row(place, (first, second) if pair else line)


def _columns(place: str, values: Mapping[str, Any], *, pair: bool) -> TextRow | str:
    named = {str(name).strip().lower(): value for name, value in values.items() if value is not None}
    both = next((names for names in PAIR_COLUMNS if all(name in named for name in names)), None)
    single = next((name for name in TEXT_COLUMNS if name in named), None)
    if both and (pair or "text" not in named):
        return _row(place, (named[both[0]], named[both[1]]))
    if pair or single is None:
        wanted = "text_a and text_b" if pair else "text"
        return f"{place}: expected the columns {wanted}, found {', '.join(map(str, values)) or 'none'}."
    return _row(place, named[single])


def _row(place: str, text: Any) -> TextRow | str:
    for part in text if isinstance(text, tuple) else (text,):
        if not isinstance(part, str):
            return f"{place}: expected text, found {part!r}."
        if any("\ud800" <= character <= "\udfff" for character in part):
            return f"{place}: the text is not valid UTF-8."
        if not part.strip():
            return f"{place}: the text is empty."
    return TextRow(place, text)
