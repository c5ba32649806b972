"""From what a person writes to the files it means, and from an adapter to the base it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from edgetune.artifacts import RUN_RECORD, RUN_RECORD_KEY, BaseModel, Fingerprint, Gguf, Run
from edgetune.errors import CorruptFileError, EdgetuneError, UsageError
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf, read_gguf_header
from edgetune.library.describe import checkpoint_architecture
from edgetune.library.index import classify, list_models


@dataclass(frozen=True)
class Resolved:
    """What a MODEL argument stands for."""

    base: Path
    """A GGUF model or a Hugging Face directory."""
    lora: Path | None = None
    """The adapter GGUF that belongs on it: a run brings its newest one."""


def find_model(name_or_path: str) -> Path:
    """The Hugging Face directory, run directory or GGUF file that `name_or_path` means; a path wins over a name.

    Raises `UsageError` with the nearest names when there is none.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file() or classify(path):
        return path
    known = list_models()
    for entry in known:
        if entry.name == name_or_path:
            return entry.path
    if path.is_dir():
        raise UsageError(
            f"{name_or_path} is a directory without config.json or adapter_config.json.",
            hint="Give a Hugging Face model directory, a run directory, a .gguf file, or a name: edgetune models list",
        )
    beside = [str(path.parent / other.name) for other in _children(path.parent) if classify(other)]
    close = get_close_matches(name_or_path, [*{entry.name: None for entry in known}, *beside], n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise UsageError(
        f"There is no model or adapter {name_or_path!r}.", hint=hint + "List what there is: edgetune models list"
    )


def resolve_model(name_or_path: str) -> Resolved:
    """What to load for `name_or_path`: the model itself, or a run's (or an adapter's) base and adapter GGUF.

    Raises `UsageError` when nothing is found, or when a run's base or adapter file is missing.
    """
    path = find_model(name_or_path)
    kind = classify(path)
    if kind == "adapter":
        return Resolved(_path_of_base(read_gguf(path)), path)
    if kind != "run":
        return Resolved(path)
    adapters = [child for child in _children(path) if classify(child) == "adapter"]
    if not adapters:
        raise UsageError(f"The run {path} has no GGUF adapter yet.", hint=f"Make it: edgetune convert {path}")
    newest = max(adapters, key=lambda file: file.stat().st_mtime)
    return Resolved(_path_of_base(read_gguf(newest), search=_run_base(path)), newest)


def find_base_for(adapter: Gguf | Fingerprint, *, search: Sequence[Path] = ()) -> Gguf | BaseModel | None:
    """The base model whose weights `adapter` was made for, told by fingerprint; None when it is not on this machine.

    Looked at: `search` (files or directories), the library, the adapter's directory and its parent, the working
    directory, and where the training record says the base was. Of several GGUF files the one made last wins, since that
    is the one its owner meant to run; a Hugging Face directory is the answer when there is no GGUF.
    """
    fingerprint = adapter if isinstance(adapter, Fingerprint) else adapter.fingerprint
    if not fingerprint.weights:
        return None
    places = [*search, *(entry.path for entry in list_models()), Path.cwd()]
    if isinstance(adapter, Gguf):
        folder = adapter.path.resolve().parent
        places += [folder, folder.parent, *_recorded_base(adapter.path), *_run_base(folder)]
    candidates = list(dict.fromkeys(path.resolve() for place in places for path in _candidates(place)))
    if ggufs := list(_matching_ggufs(candidates, fingerprint)):
        return max(ggufs, key=lambda gguf: gguf.path.stat().st_mtime)
    return next(_matching_checkpoints(candidates, fingerprint), None)


def adapters_for(base: Fingerprint) -> list[Path]:
    """The adapter GGUFs and runs of the library that were trained on the base with this fingerprint, newest first."""
    return [entry.path for entry in list_models() if base.weights and _trained_on(entry.path) == base.weights]


def _trained_on(path: Path) -> str:
    try:
        if path.is_dir():
            return Run.load(path).fingerprint.weights if (path / RUN_RECORD).is_file() else ""
        gguf = read_gguf(path)
        return gguf.fingerprint.weights if gguf.kind == "adapter" else ""
    except (EdgetuneError, OSError):
        return ""


def _path_of_base(adapter: Gguf, *, search: Sequence[Path] = ()) -> Path:
    base = find_base_for(adapter, search=search)
    if base:
        return base.path
    # Without a fingerprint (a PEFT directory from elsewhere) the adapter's own word for its base has to do.
    for path in search:
        if classify(path) in ("checkpoint", "model"):
            return path
    named = f" {adapter.base_name!r}" if adapter.base_name else ""
    raise UsageError(
        f"The base model{named} of {adapter.path} is not on this machine.",
        hint=f"Name it: edgetune chat MODEL --lora {adapter.path}",
    )


def _run_base(run_dir: Path) -> list[Path]:
    try:
        if (run_dir / RUN_RECORD).is_file():
            return [Run.load(run_dir).base_path]
        config = json.loads((run_dir / "adapter_config.json").read_text(encoding="utf-8"))
        return [Path(config["base_model_name_or_path"])]
    except (OSError, ValueError, KeyError, TypeError, CorruptFileError):
        return []


def _recorded_base(adapter_path: Path) -> list[Path]:
    record = read_gguf_header(adapter_path).metadata.get(RUN_RECORD_KEY)
    try:
        return [Path(json.loads(str(record))["base_path"])] if record else []
    except (ValueError, KeyError, TypeError):
        return []


def _candidates(place: Path) -> Iterator[Path]:
    """`place` itself, the GGUF files in it, and, of a model directory, those beside it."""
    yield place
    yield from (child for child in _children(place) if child.suffix.lower() == ".gguf")
    if classify(place) == "checkpoint":
        yield from (child for child in _children(place.parent) if child.suffix.lower() == ".gguf")


def _children(directory: Path) -> list[Path]:
    try:
        # Hidden ones are being written, or were left behind half-written; a link to itself does not exist.
        return sorted(child for child in directory.iterdir() if child.name[0] != "." and child.exists())
    except OSError:
        return []


def _matching_ggufs(paths: Iterable[Path], wanted: Fingerprint) -> Iterator[Gguf]:
    for path in paths:
        if path.suffix.lower() != ".gguf" or not path.is_file():
            continue
        try:
            gguf = read_gguf(path)
        except (EdgetuneError, OSError):
            continue
        if gguf.kind == "model" and gguf.fingerprint.weights == wanted.weights:
            yield gguf


def _matching_checkpoints(paths: Iterable[Path], wanted: Fingerprint) -> Iterator[BaseModel]:
    for path in paths:
        if classify(path) != "checkpoint":
            continue
        try:
            fingerprint = fingerprint_checkpoint(path)
            if fingerprint.weights == wanted.weights:
                yield BaseModel(path, checkpoint_architecture(path), fingerprint)
        except (EdgetuneError, OSError):
            continue
