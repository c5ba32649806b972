"""What an encoder-decoder is given for a task: the prefix its family was trained with, and languages by code or name.

T5 reads tasks from words before the text; mBART reads languages from tokens. Families that learned no such words are
refused: a made-up prefix would only disturb them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.artifacts import RUN_RECORD, RUN_RECORD_KEY, Run
from edgetune.errors import UsageError
from edgetune.gguf_header import read_gguf_header
from edgetune.languages import find_language

TASKS = ("summarize", "translate", "qa")
_T5_LIKE = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}
"""The languages T5 learned to translate between, by the names it knows."""


@dataclass(frozen=True)
class Prompting:
    """How texts become sources."""

    task: str | None = None
    source_language: str = ""
    target_language: str = ""
    context: str = ""
    prefix: str = ""
    """What is put before every text that does not begin with it, as a run did."""

    def source(self, text: str | tuple[str, str], *, family: str) -> str:
        """What is encoded for `text`, or for a question and its context."""
        question, context = text if isinstance(text, tuple) else (text, self.context)
        if self.task == "qa":
            _require_t5(family, self.task)
            if not context:
                raise UsageError("--task qa needs what the question is about.", hint="Give it with --context TEXT.")
            return f"question: {question} context: {context}"
        if context:
            raise UsageError("--context is for --task qa.", hint="Leave it out.")
        if self.task == "summarize":
            _require_t5(family, self.task)
            return f"summarize: {question}"
        if self.task == "translate" and family in _T5_LIKE:
            source, target = _name(self.source_language or "en"), _name(self.target_language or "de")
            return f"translate {source} to {target}: {question}"
        return question if question.startswith(self.prefix) else self.prefix + question

    def check(self, family: str, languages: Any) -> None:
        """Raise `UsageError` for a task or a language that the family does not know."""
        if self.task in ("summarize", "qa"):
            _require_t5(family, self.task)
        if family in _T5_LIKE and not languages:
            if self.task == "translate":
                _name(self.source_language or "en")
                _name(self.target_language or "de")
            elif self.source_language or self.target_language:
                raise UsageError("T5 reads languages from its task.", hint="Add --task translate.")
            return
        if self.task == "translate" and not languages:
            _require_t5(family, self.task)
        if self.task == "translate" and not self.target_language:
            raise UsageError(
                "--task translate needs the language to translate to.",
                hint=f"Give it with --tgt-lang: {', '.join(sorted(languages))}.",
            )
        for wanted in (self.source_language, self.target_language):
            if wanted:
                find_language(wanted, languages)


def trained_prompting(files: Iterable[Path]) -> Prompting | None:
    """What the first of these files that was trained to rewrite texts put around them; None where none says so.

    `files` are runs, GGUF adapters and GGUF models, in which a record of the run may be.
    """
    for path in files:
        record = _record(path)
        data = record.get("data")
        if record.get("task") == "seq2seq" and isinstance(data, dict):
            source, target, prefix = (str(data.get(name) or "") for name in ("src_lang", "tgt_lang", "source_prefix"))
            return Prompting(source_language=source, target_language=target, prefix=prefix)
    return None


def _record(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return Run.load(path).record() if (path / RUN_RECORD).is_file() else {}
    try:
        record = json.loads(str(read_gguf_header(path).metadata.get(RUN_RECORD_KEY, "{}")))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _name(code: str) -> str:
    short = code.lower().replace("-", "_").partition("_")[0]
    name = _NAMES.get(short) or next((one for one in _NAMES.values() if one.lower() == code.lower()), None)
    if name is None:
        known = ", ".join(f"{short} ({name})" for short, name in _NAMES.items())
        raise UsageError(f"T5 was not trained on the language {code!r}.", hint=f"It knows {known}.")
    return name


def _require_t5(family: str, task: str | None) -> None:
    if family not in _T5_LIKE:
        raise UsageError(
            f"--task {task} puts T5's words before a text; {family or 'this model'} learned none.",
            hint="Leave out --task: the model does what it was trained for.",
        )
