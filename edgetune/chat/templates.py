"""Prompt templates: texts with places to fill in, each a file in the home's `templates`; `{input}` is what follows."""

from __future__ import annotations

import re
from pathlib import Path

from edgetune.errors import UsageError
from edgetune.paths import home_dir, whole_file

PLACE = "{input}"
_NAME = re.compile(r"[\w][\w.-]*")


def template_names() -> list[str]:
    """Every template there is."""
    return sorted(path.stem for path in _directory().glob("*.txt"))


def load_template(name: str) -> str:
    """The template called `name`. Raises `UsageError` when there is none."""
    try:
        return _path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(template_names())
        raise UsageError(
            f"There is no prompt template {name!r}.",
            hint=f"Known: {known}." if known else f"Make one: /template save {name} TEXT, with {PLACE} in it.",
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{_path(name)} is not UTF-8 text: {error}.") from error


def fill_template(name: str, text: str) -> str:
    """The template with `text` in its place, or after it."""
    template = load_template(name)
    return template.replace(PLACE, text) if PLACE in template else f"{template.rstrip()}\n\n{text}".rstrip()


def save_template(name: str, text: str) -> Path:
    """Keep `text` as the template `name`; returns its file."""
    if not text.strip():
        raise UsageError("A prompt template needs a text.", hint=f"/template save sum Sum this up: {PLACE}")
    with whole_file(_path(name)) as partial:
        partial.write_text(text, encoding="utf-8")
    return _path(name)


def delete_template(name: str) -> None:
    """Forget a template. Raises `UsageError` when there is none."""
    load_template(name)
    _path(name).unlink()


def _directory() -> Path:
    return home_dir() / "templates"


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a template.", hint="Letters, digits, dots and dashes.")
    return _directory() / f"{name}.txt"
