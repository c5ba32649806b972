"""From what a person wrote to files that can be opened, whichever front end it was written in.

A Hugging Face directory is converted once, into the cache, under its fingerprint; a run brings its base and adapter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgetune.chat.adapters import find_adapter
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import CorruptFileError, ResourceError, UnsupportedError, UsageError
from edgetune.events import Notice, Sink
from edgetune.gguf_header import read_gguf, read_gguf_header
from edgetune.library import classify, find_base_for, find_model, purpose_of, resolve_model

DEFAULT_MODEL = "pocket"


@dataclass(frozen=True)
class ModelChoice:
    """Files that can be opened."""

    base: Path
    """A GGUF model."""
    lora: tuple[LoraSpec, ...]


def choose_model(model: str | None, lora: Sequence[str], *, sink: Sink) -> ModelChoice:
    """Find the files that MODEL and the --lora values mean; a checkpoint is converted if the cache does not have it."""
    adapters = [find_adapter(value) for value in lora]
    if model is None and adapters:
        base = _base_of(adapters[0].path, sink)
    else:
        resolved = resolve_model(model or DEFAULT_MODEL)
        base = resolved.base
        if resolved.lora and not adapters:
            adapters = [LoraSpec(resolved.lora)]
    return ModelChoice(as_gguf(base, sink=sink), tuple(adapters))


def as_gguf(base: Path, *, sink: Sink) -> Path:
    """`base` if it is a GGUF, else the GGUF made of that Hugging Face directory; made once and kept in the cache."""
    if base.is_file():
        return base
    from edgetune.fingerprint import fingerprint_checkpoint, settings_sha256
    from edgetune.paths import cache_dir

    fingerprint = fingerprint_checkpoint(base, sink=sink)
    parts = (fingerprint.weights, fingerprint.tokenizer, fingerprint.template, settings_sha256(base))
    key = "-".join(part[:12] for part in parts if part)
    path = cache_dir() / "gguf" / key / f"{base.resolve().name}.gguf"
    if not _is_whole(path):
        from edgetune.export import export_base

        sink(Notice(f"Converting {base.resolve().name} for llama.cpp, this once."))
        try:
            export_base(base, path, sink=sink)
        except (ResourceError, UsageError) as error:
            if isinstance(error, ResourceError) or not os.access(cache_dir(), os.W_OK):
                error.hint = "Let EDGETUNE_HOME name a directory with room, or convert it yourself: edgetune convert"
            raise
    return path


def _is_whole(path: Path) -> bool:
    """Whether there is a GGUF at `path`; one that was cut can be made again."""
    if not path.is_file():
        return False
    try:
        read_gguf_header(path)
    except CorruptFileError:
        return False
    return True


def find_draft(draft: str, *, sink: Sink) -> str:
    """What `LlamaEngine.open` takes for --draft."""
    if draft in ("", "ngram"):
        return draft
    return str(as_gguf(resolve_model(draft).base, sink=sink))


def _base_of(adapter: Path, sink: Sink) -> Path:
    gguf = read_gguf(adapter)
    if gguf.kind != "adapter":
        raise UsageError(f"{adapter} is a model, not an adapter.", hint=f"Give it as MODEL: edgetune chat {adapter}")
    base = find_base_for(gguf)
    if base is None:
        named = f" {gguf.base_name!r}" if gguf.base_name else ""
        raise UsageError(
            f"The base model{named} of {adapter} is not on this machine.",
            hint=f"Name it: edgetune chat MODEL --lora {adapter}",
        )
    sink(Notice(f"Base found: {base.path}"))
    return base.path


def check_writes(model: str | None) -> None:
    """Raise `UnsupportedError` for a directory of a model that writes nothing by itself, before it is converted."""
    if model is None or (kind := classify(path := find_model(model))) not in ("checkpoint", "run"):
        return
    purpose = purpose_of(path, kind)
    if purpose != "chat":
        what = "answers a source" if purpose == "generate" else "writes no text"
        raise UnsupportedError(f"{path} {what}.", hint=f"Use it with edgetune {purpose}.")
