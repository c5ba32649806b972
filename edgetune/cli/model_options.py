"""The flags that say which model to run and how, and the way from what a person wrote to files that can be opened.

A Hugging Face directory is converted once, into the cache, under its fingerprint; a run brings its base and adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgetune.cli.progress import say, show_progress
from edgetune.errors import CorruptFileError, ResourceError, UnsupportedError, UsageError
from edgetune.events import Notice, Sink

if TYPE_CHECKING:
    from edgetune.chat import Session
    from edgetune.engine.protocol import LoraSpec

_Function = TypeVar("_Function", bound=Callable[..., Any])

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
DEFAULT_MODEL = "pocket"
_ENGINE_OPTIONS = (
    "ctx_size", "gpu_layers", "threads", "batch_size", "cache_type_k", "cache_type_v", "flash_attn", "draft", "verbose",
)  # fmt: skip


def layer_count(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A number of layers; -1 for "auto", which is what it is called further down."""
    try:
        return -1 if value == "auto" else int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.", ctx, param) from None


@dataclass(frozen=True)
class ModelChoice:
    """Files that can be opened."""

    base: Path
    """A GGUF model."""
    lora: tuple[LoraSpec, ...]


def model_options(function: _Function) -> _Function:
    """Add --lora, --force and the engine's flags; `open_chosen` consumes them."""
    cache = click.Choice(CACHE_TYPES)
    for decorate in reversed(
        (
            click.option(
                "--lora", multiple=True, metavar="FILE[:SCALE]",
                help="Apply an adapter: a GGUF file, a run directory or a name; repeatable.",
            ),
            click.option("--force", is_flag=True, help="Try an adapter although it was trained on another base."),
            click.option(
                "-c", "--ctx-size", type=click.IntRange(min=0), default=0, show_default=True,
                help="Context in tokens; 0 is the model's own, or what memory allows.",
            ),
            click.option(
                "-ngl", "--gpu-layers", "--n-gpu-layers", "gpu_layers", callback=layer_count,
                default="auto", metavar="N|auto", show_default=True,
                help="Layers to keep on the GPU; auto is all that fit.",
            ),
            click.option(
                "-t", "--threads", type=click.IntRange(min=0), default=0, show_default=True,
                help="CPU threads; 0 is the number of physical cores.",
            ),
            click.option(
                "-b", "--batch-size", type=click.IntRange(min=1), default=512, show_default=True,
                help="Prompt tokens evaluated at once.",
            ),
            click.option("-ctk", "--cache-type-k", type=cache, default="f16", show_default=True, help="Cached keys."),
            click.option("-ctv", "--cache-type-v", type=cache, default="f16", show_default=True, help="Cached values."),
            click.option(
                "-fa", "--flash-attn", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                help="Flash attention.",
            ),
            click.option(
                "--draft", metavar="ngram|MODEL", default="",
                help="Guess tokens ahead, from the text itself or with a smaller model of the same vocabulary; "
                "what is said stays the same, ties within rounding aside.",
            ),
            click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
        )
    ):  # fmt: skip
        function = decorate(function)
    return function


def open_chosen(model: str | None, options: dict[str, Any]) -> Session:
    """Open MODEL, or the base of the adapters given, with what `model_options` added; those leave `options`."""
    lora, force = options.pop("lora"), options.pop("force")
    engine_options = {name: options.pop(name) for name in _ENGINE_OPTIONS}
    _check_purpose(model)
    with show_progress() as sink:
        choice = choose_model(model, lora, sink=sink)
        engine_options["draft"] = _find_draft(engine_options["draft"], sink=sink)
    from edgetune.chat import open_session
    from edgetune.cli.last_words import speak_before_aborting

    speak_before_aborting()
    session = open_session(choice.base, lora=choice.lora, force=force, **engine_options)
    engine = session.engine
    asked = engine_options["ctx_size"]
    if asked > engine.trained_context:
        say(f"The model was trained on texts of up to {engine.trained_context} tokens, not {asked}.", warning=True)
    elif not asked and engine.context_size < engine.trained_context:
        say(f"The context is {engine.context_size} of {engine.trained_context} tokens to spare memory; -c sets it.")
    return session


def _check_purpose(model: str | None) -> None:
    """Raise `UnsupportedError` for a directory of a model that writes nothing by itself, before it is converted."""
    from edgetune.library import classify, find_model, purpose_of

    if model is None or (kind := classify(path := find_model(model))) not in ("checkpoint", "run"):
        return
    purpose = purpose_of(path, kind)
    if purpose != "chat":
        what = "answers a source" if purpose == "generate" else "writes no text"
        raise UnsupportedError(f"{path} {what}.", hint=f"Use it with edgetune {purpose}.")


def choose_model(model: str | None, lora: Sequence[str], *, sink: Sink) -> ModelChoice:
    """Find the files that MODEL and the --lora values mean; a checkpoint is converted if the cache does not have it."""
    from edgetune.chat.adapters import find_adapter
    from edgetune.engine.protocol import LoraSpec

    adapters = [find_adapter(value) for value in lora]
    if model is None and adapters:
        base = _base_of(adapters[0].path)
    else:
        from edgetune.library import resolve_model

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
    from edgetune.gguf_header import read_gguf_header

    if not path.is_file():
        return False
    try:
        read_gguf_header(path)
    except CorruptFileError:
        return False
    return True


def _find_draft(draft: str, *, sink: Sink) -> str:
    """What `LlamaEngine.open` takes for --draft."""
    if draft in ("", "ngram"):
        return draft
    from edgetune.library import resolve_model

    return str(as_gguf(resolve_model(draft).base, sink=sink))


def _base_of(adapter: Path) -> Path:
    from edgetune.gguf_header import read_gguf
    from edgetune.library import find_base_for

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
    say(f"Base found: {base.path}")
    return base.path
