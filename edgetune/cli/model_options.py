"""The flags that say which model to run and how; `edgetune.opening` opens what they say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgetune.cli.progress import show_progress
from edgetune.events import Sink

if TYPE_CHECKING:
    from edgetune.chat import Session

_Function = TypeVar("_Function", bound=Callable[..., Any])

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
MODEL_OPTIONS = (
    "lora", "force", "ctx_size", "gpu_layers", "threads", "batch_size", "cache_type_k", "cache_type_v", "flash_attn",
    "draft", "verbose",
)  # fmt: skip
"""The names of what `model_options` adds."""


def layer_count(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A number of layers; -1 for "auto", which is what it is called further down."""
    try:
        return -1 if value == "auto" else int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number nor auto.", ctx, param) from None


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


def open_chosen(model: str | None, options: dict[str, Any], *, sink: Sink | None = None) -> Session:
    """Open MODEL, or the base of the adapters given, with what `model_options` added; those leave `options`.

    What is to be told goes to stderr, or to `sink`: where a screen fills the terminal, nothing else may draw on it.
    """
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.opening.writers import open_session

    taken = {name: options.pop(name) for name in MODEL_OPTIONS}
    speak_before_aborting()
    with show_progress() if sink is None else nullcontext(sink) as told:
        return open_session(model, taken.pop("lora"), sink=told, **taken)
