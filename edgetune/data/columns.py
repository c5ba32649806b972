"""Raw rows → examples of the tasks beside chat: labelled, scored and related texts, and texts rewritten as others.

Recognises the columns that public datasets use (text, label; sentence1, sentence2, score; source, target; anchor,
positive, negative; …) and checks every row. Knows no label list and no vocabulary. A row that breaks its format raises
`RowError` with what was expected and what was found.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.data.formats import present_columns, read_text
from edgetune.data.messages import RowError, describe


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and what it is."""

    first: str
    second: str | None
    labels: tuple[str, ...]
    """Names; one, unless the row lists them."""
    many: bool = False
    """Whether the row's labels are a list, of any length."""


@dataclass(frozen=True)
class Scored:
    """A text, or a pair of texts, and a number."""

    first: str
    second: str | None
    score: float


@dataclass(frozen=True)
class Rewritten:
    """A text and the text to make of it."""

    source: str
    target: str
    kind: str = ""
    """"translation", "summarization", "qa", or nothing in particular."""


@dataclass(frozen=True)
class Related:
    """Texts that belong together, and others that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: float | None = None
    """How close anchor and positive are, where the row says it."""


@dataclass(frozen=True)
class Columns:
    """One known layout of rows for one task."""

    name: str
    columns: str
    """The columns a row has, for people."""
    matches: Callable[[Mapping[str, Any]], bool]
    read_row: Callable[[Mapping[str, Any]], Any]

    def read(self, values: Mapping[str, Any]) -> Any:
        """The example that `values` describe. Raises `RowError`."""
        present = present_columns(values)
        if not self.matches(present):
            found = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in values.items())
            raise RowError(f"{self.name} ({self.columns})", f"the columns {found or 'none'}")
        return self.read_row(present)


_SINGLE = ("text", "sentence", "content", "input")
_PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
_LABEL = ("label", "labels", "category", "class")
_SCORE = ("score", "similarity_score", "similarity", "value", "rating")
_REWRITES = (
    ("source", "target", ""),
    ("article", "summary", "summarization"),
    ("article", "highlights", "summarization"),
    ("document", "summary", "summarization"),
    ("dialogue", "summary", "summarization"),
    ("text", "summary", "summarization"),
    ("prompt", "completion", ""),
    ("instruction", "output", ""),
)
_ANCHOR, _POSITIVE, _NEGATIVE = ("anchor", "query"), ("positive", "pos"), ("negative", "negatives", "neg")
_NO_LANGUAGES = ("id", "idx", "row", "key", "url", "pos", "neg", "tag")
_LANGUAGE = re.compile(r"[a-z]{2,3}([_-][a-z]{2,4})?")


def _name(values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in values), None)


def _pair(values: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in values and pair[1] in values), None)


def _texts(values: Mapping[str, Any]) -> tuple[str, str | None]:
    if (pair := _pair(values)) is not None:
        return read_text(values, pair[0]), read_text(values, pair[1])
    return read_text(values, _name(values, _SINGLE) or ""), None


def _has_text(values: Mapping[str, Any]) -> bool:
    return _pair(values) is not None or _name(values, _SINGLE) is not None


def _labels(value: Any, name: str) -> tuple[tuple[str, ...], bool]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # a label may begin with a bracket
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(_label(item, name) for item in value)), True
    return (_label(value, name),), False


def _label(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        hint = " (for numbers as such: --task regression)" if isinstance(value, float) else ""
        raise RowError(f"a label in {name!r}: text, a whole number, true or false", f"{value!r}{hint}")
    if not value.strip():
        raise RowError(f"a label in {name!r}", "nothing" if not value else "only white space")
    return value.strip()


_LARGEST = 3e38
"""Scores are learned in float32."""


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise RowError(f"a number in {name!r}", describe(value))
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise RowError(f"a number in {name!r}", describe(value)) from error
    if not math.isfinite(number):
        raise RowError(f"a finite number in {name!r}", str(value))
    if abs(number) > _LARGEST:
        raise RowError(f"a number that 32 bits hold in {name!r}", str(value))
    return number


def _labelled(values: Mapping[str, Any]) -> Labelled:
    name = _name(values, _LABEL) or ""
    first, second = _texts(values)
    return Labelled(first, second, *_labels(values[name], name))


def _scored(values: Mapping[str, Any]) -> Scored:
    name = _name(values, (*_SCORE, *_LABEL)) or ""
    return Scored(*_texts(values), _number(values[name], name))


def _rewrite_columns(values: Mapping[str, Any]) -> tuple[str, str, str] | None:
    return next((entry for entry in _REWRITES if entry[0] in values and entry[1] in values), None)


def _rewritten(values: Mapping[str, Any]) -> Rewritten:
    source, target, kind = _rewrite_columns(values) or ("", "", "")
    text = read_text(values, source)
    if source == "instruction" and (given := read_text(values, "input", empty=True)).strip():
        text = f"{text}\n\n{given}"
    return Rewritten(text, read_text(values, target), kind)


def _answered(values: Mapping[str, Any]) -> Rewritten:
    """A question with its context, worded as T5 was taught it."""
    name = _name(values, ("answer", "answers")) or ""
    answer = values[name]
    if isinstance(answer, Mapping):  # SQuAD: {"text": [...], "answer_start": [...]}
        answer = answer.get("text")
    if isinstance(answer, list | tuple):
        if not answer:
            raise RowError(f"an answer in {name!r}", "an empty list")
        answer = answer[0]
    text = f"question: {read_text(values, 'question')}"
    if "context" in values:
        text += f" context: {read_text(values, 'context')}"
    return Rewritten(text, read_text({name: answer}, name), "qa")


def languages(values: Mapping[str, Any]) -> list[str]:
    """The language columns of a row of translations, in their order; empty when it is none."""
    present = present_columns(values)
    inner = present.get("translation")
    if isinstance(inner, Mapping):
        return [str(name) for name, text in inner.items() if text is not None]
    names = [name for name in present if _LANGUAGE.fullmatch(name) and name not in _NO_LANGUAGES]
    return names if len(names) == 2 else []


def translations(source: str, target: str) -> Columns:
    """The format of rows that hold the same text in languages `source` and `target`."""

    def texts(values: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = values.get("translation")
        return {str(k).lower(): v for k, v in inner.items()} if isinstance(inner, Mapping) else values

    def read(values: Mapping[str, Any]) -> Rewritten:
        found = texts(values)
        return Rewritten(read_text(found, source), read_text(found, target), "translation")

    return Columns(
        "translations", f"{source}, {target}", lambda row: source in texts(row) and target in texts(row), read
    )


def _negatives(values: Mapping[str, Any]) -> tuple[str, ...]:
    name = _name(values, _NEGATIVE)
    if name is None:
        return ()
    found = values[name] if isinstance(values[name], list | tuple) else [values[name]]
    return tuple(read_text({name: item}, name) for item in found)


def _related(values: Mapping[str, Any]) -> Related:
    anchor, positive = _name(values, _ANCHOR) or "", _name(values, _POSITIVE) or ""
    value = values[positive]
    if isinstance(value, list | tuple):
        if not value:
            raise RowError(f"a text in {positive!r}", "an empty list")
        value = value[0]
    return Related(read_text(values, anchor), read_text({positive: value}, positive), _negatives(values))


def _asked(values: Mapping[str, Any]) -> Related:
    return Related(read_text(values, "question"), read_text(values, "answer"))


def _compared(values: Mapping[str, Any]) -> Related:
    name = _name(values, (*_SCORE, *_LABEL)) or ""
    first, second = _texts(values)
    assert second is not None
    return Related(first, second, (), _number(values[name], name))


CLASSIFICATION = (
    Columns(
        "labelled texts",
        "text, label; text_a, text_b, label; labels as a list",
        lambda row: _has_text(row) and _name(row, _LABEL) is not None,
        _labelled,
    ),
)
REGRESSION = (
    Columns(
        "scored texts",
        "text, score; text_a, text_b, score",
        lambda row: _has_text(row) and _name(row, (*_SCORE, *_LABEL)) is not None,
        _scored,
    ),
)
REWRITING = (
    Columns(
        "questions with answers",
        "question, [context], answer",
        lambda row: "question" in row and _name(row, ("answer", "answers")) is not None,
        _answered,
    ),
    Columns(
        "sources and targets",
        "source, target; article, summary",
        lambda row: _rewrite_columns(row) is not None,
        _rewritten,
    ),
)
"""Beside `translations`."""
EMBEDDING = (
    Columns(
        "related texts",
        "anchor, positive, [negative]",
        lambda row: _name(row, _ANCHOR) is not None and _name(row, _POSITIVE) is not None,
        _related,
    ),
    Columns(
        "compared texts",
        "sentence1, sentence2, score",
        lambda row: _pair(row) is not None and _name(row, (*_SCORE, *_LABEL)) is not None,
        _compared,
    ),
    Columns("questions with answers", "question, answer", lambda row: "question" in row and "answer" in row, _asked),
)


def possible_tasks(values: Mapping[str, Any]) -> list[str]:
    """The tasks beside chat and completion that a row with these columns is plainly for."""
    row = present_columns(values)
    found = []
    if _has_text(row) and (name := _name(row, _LABEL)) is not None:
        found += _tasks_of_label(row[name])
    if _has_text(row) and _name(row, _SCORE) is not None:
        found.append("regression")
    if EMBEDDING[0].matches(row) or EMBEDDING[2].matches(row):
        found.append("embedding")
    if EMBEDDING[1].matches(row) and "regression" in found:
        found.append("embedding")
    if any(known.matches(row) for known in REWRITING) or languages(values):
        found.append("seq2seq")
    return list(dict.fromkeys(found))


def _tasks_of_label(value: Any) -> list[str]:
    """Numbers with decimals are no names; as text (in CSV) they might be."""
    if isinstance(value, float) and not value.is_integer():
        return ["regression"]
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\.\d*\s*", value):
        return ["classification", "regression"]
    return ["classification"]
