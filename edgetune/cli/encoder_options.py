"""The flags that say with which model, adapters and engine texts become vectors or labels, and how that is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgetune.cli.model_options import layer_count
from edgetune.cli.progress import say, show_progress
from edgetune.events import Event, Progress, Sink

if TYPE_CHECKING:
    from edgetune.engine.encoder import Encoder

_Function = TypeVar("_Function", bound=Callable[..., Any])

CHUNK = 2048
"""Texts handed to the engine at once; their results are written before the next ones are computed."""


def encoder_options(function: _Function) -> _Function:
    """Add --lora, --engine and their kin; `open_model` consumes them."""
    for decorate in reversed(
        (
            click.option(
                "--lora", multiple=True, metavar="FILE[:SCALE]",
                help="Apply an adapter, and the head it brings: a GGUF file, a run directory or a name; repeatable.",
            ),
            click.option("--force", is_flag=True, help="Try an adapter although it was trained on another base."),
            click.option(
                "--engine", type=click.Choice(["auto", "llama", "torch"]), default="auto", show_default=True,
                help="llama.cpp, or torch for a Hugging Face directory or a run; auto is llama.cpp where it can.",
            ),
            click.option(
                "--dtype", type=click.Choice(["auto", "f32", "bf16"]), default="auto", show_default=True,
                help="What torch computes in; auto is bf16 where the processor does.",
            ),
            click.option(
                "--long", type=click.Choice(["truncate", "window", "error"]), default="truncate", show_default=True,
                help="Texts over the model's limit: cut them, average over windows of them, or refuse.",
            ),
            click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read or are empty."),
            click.option(
                "-ngl", "--gpu-layers", callback=layer_count, default="auto", metavar="N|auto", show_default=True,
                help="Layers to keep on the GPU; auto is all where there is one.",
            ),
            click.option(
                "-t", "--threads", type=click.IntRange(min=0), default=0, show_default=True,
                help="CPU threads; 0 is the number of physical cores.",
            ),
            click.option(
                "-fa", "--flash-attn", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True,
                help="Flash attention.",
            ),
            click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log."),
        )
    ):  # fmt: skip
        function = decorate(function)
    return function


def open_model(model: str, options: dict[str, Any], *, sink: Sink) -> Encoder:
    """Open MODEL with what `encoder_options` added; those leave `options`, but for `long` and `skip_bad`."""
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.opening.encoders import open_encoder

    names = ("lora", "force", "engine", "dtype", "verbose", "gpu_layers", "threads", "flash_attn")
    taken = {name: options.pop(name) for name in names}
    speak_before_aborting()
    return open_encoder(model, taken.pop("lora"), sink=sink, **taken)


@contextmanager
def shown_progress(total: int) -> Iterator[Callable[[int], Sink]]:
    """Yield what makes a sink for the chunk that starts at a text's number, out of `total`."""
    with show_progress() as sink:

        def of_chunk(start: int) -> Sink:
            def hear(event: Event) -> None:
                if isinstance(event, Progress):
                    event = Progress(event.stage, start + event.done, total, event.unit, event.label)
                sink(event)

            return hear

        yield of_chunk


def say_what_was_cut(encoder: Encoder) -> None:
    """Say how many texts were longer than the model takes, and what became of them."""
    limit = encoder.profile.max_tokens
    if encoder.cut_texts:
        what = "1 text was" if encoder.cut_texts == 1 else f"{encoder.cut_texts} texts were"
        say(f"{what} longer than the {limit} tokens that the model takes, and cut.", warning=True)
    if encoder.windowed_texts:
        what = "1 text was" if encoder.windowed_texts == 1 else f"{encoder.windowed_texts} texts were"
        say(f"{what} longer than {limit} tokens, and averaged over windows.")
