"""What this machine knows: the embedded model, files put into the library's folder, and everything ever registered.

One small JSON file per registered path, so that two commands at once cannot lose each other's entry. What was deleted
since is dropped when the list is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgetune.errors import CorruptFileError, EdgetuneError, UsageError
from edgetune.fingerprint import transformer_dir
from edgetune.gguf_header import read_gguf
from edgetune.paths import home_dir, write_json

EMBEDDED_NAME = "pocket"
"""The name of the model that comes with edgetune."""

Kind = Literal["checkpoint", "run", "model", "adapter"]
"""A Hugging Face directory, a PEFT adapter directory (a run has a record as well), a GGUF model, a GGUF adapter."""


@dataclass(frozen=True)
class Entry:
    """One thing the library knows."""

    name: str
    """What to call it on the command line."""
    path: Path
    kind: Kind
    added: float
    """Seconds since the epoch: when it was registered, or last changed."""
    embedded: bool = False
    """Whether it comes with edgetune."""


def embedded_model_dir() -> Path:
    """The directory of the model that comes with edgetune, in an installed package or in a checkout.

    Raises `CorruptFileError` when the installation lacks it.
    """
    package_dir = Path(__file__).resolve().parents[1]
    for candidate in (package_dir / "_models" / EMBEDDED_NAME, package_dir.parent / "models" / EMBEDDED_NAME):
        if (candidate / "config.json").is_file():
            return candidate
    raise CorruptFileError("This installation lacks the embedded model 'pocket'.", hint="Install edgetune again.")


def list_models() -> list[Entry]:
    """Everything the library knows, the embedded model first and then the newest first; deleted files are dropped."""
    found: dict[Path, Entry] = {}
    try:
        embedded = embedded_model_dir()
        found[embedded] = Entry(EMBEDDED_NAME, embedded, "checkpoint", embedded.stat().st_mtime, embedded=True)
    except CorruptFileError:
        pass  # `doctor` reports a damaged installation; the rest of the library still works.
    others = sorted(_known_paths(), key=lambda known: -known[1])
    for path, added in others:
        kind = classify(path)
        if kind and path not in found:
            found[path] = Entry(entry_name(path, kind), path, kind, added)
    return list(found.values())


def register(path: Path) -> None:
    """Remember `path` (a GGUF, a Hugging Face directory or a run), so that its name finds it from anywhere.

    Best effort: a home that cannot be written stops nobody.
    """
    path = Path(os.path.realpath(path))
    try:
        write_json(_record_path(path), {"path": str(path), "added": time.time()})
    except (OSError, EdgetuneError):
        return


def remove(name_or_path: str, *, delete: bool = False) -> Entry:
    """Forget an entry, by name or path; `delete` removes its GGUF file from the disk too. Returns what was removed.

    Raises `UsageError` when there is no such entry or several of that name, or when it cannot be removed.
    """
    wanted = Path(os.path.realpath(name_or_path))
    known = list_models()
    matching = [entry for entry in known if entry.path == wanted] or [
        entry for entry in known if entry.name == name_or_path
    ]
    if not matching:
        raise UsageError(f"The library has no {name_or_path!r}.", hint="List what it has: edgetune models list")
    if len(matching) > 1:
        paths = ", ".join(str(entry.path) for entry in matching)
        raise UsageError(f"{len(matching)} entries are called {name_or_path!r}.", hint=f"Give a path: {paths}")
    entry = matching[0]
    in_folder = entry.path.parent == _models_dir()
    if entry.embedded:
        raise UsageError(f"{entry.name!r} comes with edgetune and cannot be removed.")
    if delete or in_folder:
        if entry.path.is_dir():
            raise UsageError(f"{entry.path} is a directory.", hint="Delete it yourself, if that is what you want.")
        entry.path.unlink()
    _record_path(entry.path).unlink(missing_ok=True)
    return entry


def classify(path: Path) -> Kind | None:
    """What `path` is by its looks; None when it is nothing edgetune knows, or is not there."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "run"
        return "checkpoint" if (transformer_dir(path) / "config.json").is_file() else None
    if not path.is_file() or path.suffix.lower() != ".gguf":
        return None
    try:
        return read_gguf(path).kind
    except (EdgetuneError, OSError):
        return None


def entry_name(path: Path, kind: Kind) -> str:
    """The name `path` goes by: its own without the suffix; a run's name for the adapter files inside it."""
    if kind == "adapter" and path.stem.lower().startswith("adapter") and path.parent != _models_dir():
        return path.parent.name
    return path.stem if kind in ("model", "adapter") else path.name


def _models_dir() -> Path:
    return home_dir().resolve() / "models"


def _known_paths() -> Iterator[tuple[Path, float]]:
    for record in (home_dir() / "library").glob("*.json"):
        try:
            values = json.loads(record.read_text(encoding="utf-8"))
            path, added = Path(values["path"]), float(values["added"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if path.exists():
            yield path, added
        elif path.parent.is_dir():
            # Its folder is there and it is not: deleted. A folder that is away may be a disk that is not plugged in.
            record.unlink(missing_ok=True)
    if _models_dir().is_dir():
        for path in _models_dir().iterdir():
            if path.name[0] != "." and path.exists():
                yield path, path.stat().st_mtime


def _record_path(path: Path) -> Path:
    return home_dir() / "library" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
