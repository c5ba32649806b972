"""`edgetune explain`: a prompt's way through a model, on the terminal, as JSON, or as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.progress import say, show_progress
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.cli.terminal import read_stdin, valid_text
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Sink
from edgetune.paths import whole_file

if TYPE_CHECKING:
    from edgetune.explain.page import Explanation

_STEPS = 8
_WRITING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@click.command("explain", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("prompt")
@click.option("--lora", multiple=True, metavar="FILE[:SCALE]", help="Show base and adapter side by side; repeatable.")
@click.option("--chat", "as_chat", is_flag=True, help="Wrap PROMPT as one user turn with the model's chat template.")
@click.option("--system", default="", help="With --chat: the system prompt.")
@click.option(
    "--engine", type=click.Choice(["auto", "llama", "torch"]), default="auto", show_default=True,
    help="What computes: auto is llama.cpp where it has a graph for the model, else torch.",
)  # fmt: skip
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write a page to FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, of attention what each head looks at most.")
@click.option(
    "--attention", "maps", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write all attention to FILE, as numpy's .npz.",
)  # fmt: skip
@click.option(
    "-t", "--threads", type=click.IntRange(min=0), default=0, show_default=True,
    help="CPU threads; 0 is the number of physical cores.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Try an adapter although it was trained on another base.")
@sampling_options
def command(
    model: str,
    prompt: str,
    lora: tuple[str, ...],
    as_chat: bool,
    system: str,
    engine: str,
    html: Path | None,
    as_json: bool,
    maps: Path | None,
    threads: int,
    force: bool,
    **options: Any,
) -> None:
    """Follow PROMPT through MODEL in six steps: text, tokens, embedding, blocks, head, and the choice of a token.

    Every block tells what it adds and what the model would say if it ended there. With --lora, base and adapted model
    stand side by side: where in the stack the adapter changes the guess. -n is how many tokens are chosen (8). `-`
    reads PROMPT from standard input.

    \b
    edgetune explain pocket "The capital of France is"
    edgetune explain model.gguf "Where is my parcel?" --chat --lora tickets.gguf --html page.html
    """
    prompt = read_stdin() if prompt == "-" else valid_text(prompt)
    sampling = take_sampling(options)
    steps = options.pop("max_tokens")
    if steps == 0:
        raise UsageError("explain chooses at least one token.", hint="Give -n 1, or leave it out for eight.")
    if options.pop("stop"):
        raise UsageError("explain takes no --stop: it shows single tokens.", hint="Leave it out; -n limits them.")
    if sampling.grammar:
        raise UsageError("explain takes no grammar: it shows what the model says by itself.", hint="Leave it out.")
    arguments = {"chat": as_chat, "system": system, "sampling": sampling, "steps": _STEPS if steps < 0 else steps}
    with show_progress() as sink:
        shown = _explain(_Asked(model, prompt, lora, threads, force, arguments), engine, sink)
    if maps is not None:
        _write_attention(maps, shown)
    if html is not None:
        from edgetune.explain.html import page

        with whole_file(html) as partial:
            partial.write_text(page(shown), encoding="utf-8")
        say(f"Written: {html}")
    if as_json:
        click.echo(json.dumps(shown.record(), ensure_ascii=False))
    elif html is None and maps is None:
        from edgetune.cli.explain_page import print_page

        print_page(shown)


def _write_attention(path: Path, shown: Explanation) -> None:
    import numpy as np

    if not (maps := shown.attention_maps()):
        raise UnsupportedError(f"{shown.engine} does not tell this model's attention.", hint="Leave out --attention.")
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **maps)
    say(f"Written: {path}")


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for, whatever computes it."""

    model: str
    prompt: str
    lora: Sequence[str]
    threads: int
    force: bool
    arguments: dict[str, Any]


def _explain(asked: _Asked, engine: str, sink: Sink) -> Explanation:
    from edgetune.library import classify, find_model

    path = find_model(asked.model)
    kind = classify(path)
    is_directory = kind in ("checkpoint", "run")
    if engine == "auto" and is_directory and not _continues_text(path):
        engine = "torch"
    if engine != "torch":
        try:
            return _in_llama(asked, sink)
        except UnsupportedError as error:
            if engine == "llama" or not is_directory:
                raise
            say(f"{error.message} torch explains it instead.")
    return _in_torch(path, asked, sink)


def _continues_text(path: Path) -> bool:
    """Whether the Hugging Face directory or run at `path` is of a decoder, which is worth converting for llama.cpp."""
    from edgetune.export import find_base_dir
    from edgetune.library import classify, read_config

    try:
        base = find_base_dir(path) if classify(path) == "run" else path
    except UsageError:
        return True  # a run whose directory is away may have a GGUF base
    if base.is_file():
        return True
    config = read_config(base)
    architecture = str((config.get("architectures") or [""])[0])
    return not config.get("is_encoder_decoder") and architecture.endswith(_WRITING)


def _in_llama(asked: _Asked, sink: Sink) -> Explanation:
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.explain.gguf_run import explain_gguf
    from edgetune.gguf_header import read_gguf_header
    from edgetune.library import check_pair_headers
    from edgetune.opening.files import choose_model

    choice = choose_model(asked.model, asked.lora, sink=sink)
    for adapter in choice.lora:
        check_pair_headers(read_gguf_header(choice.base), read_gguf_header(adapter.path), force=asked.force)
    speak_before_aborting()
    return explain_gguf(
        choice.base, asked.prompt, lora=choice.lora, threads=asked.threads, sink=sink, **asked.arguments
    )


def _in_torch(path: Path, asked: _Asked, sink: Sink) -> Explanation:
    from edgetune.engine.torch.loading import require_torch
    from edgetune.opening.torch_files import find_torch_files

    files = find_torch_files(path, asked.lora, force=asked.force)
    require_torch()
    from edgetune.explain.checkpoint_run import explain_checkpoint

    return explain_checkpoint(
        files.base, asked.prompt, lora=files.adapters, threads=asked.threads, sink=sink, **asked.arguments
    )
