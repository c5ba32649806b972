"""`edgetune explain`: a prompt's way through a model, on the terminal, as JSON, or as an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.progress import say, show_progress
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.cli.terminal import read_stdin, valid_text
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Sink

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
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "-t", "--threads", type=click.IntRange(min=0), default=0, show_default=True,
    help="CPU threads; 0 is the number of physical cores.",
)  # fmt: skip
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
    threads: int,
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
    if options.pop("stop"):
        raise UsageError("explain takes no --stop: it shows single tokens.", hint="Leave it out; -n limits them.")
    if sampling.grammar:
        raise UsageError("explain takes no grammar: it shows what the model says by itself.", hint="Leave it out.")
    arguments = {"chat": as_chat, "system": system, "sampling": sampling, "steps": _STEPS if steps < 0 else steps}
    with show_progress() as sink:
        shown = _explain(model, prompt, lora, engine, threads, arguments, sink)
    if html is not None:
        from edgetune.explain.html import page
        from edgetune.paths import whole_file

        with whole_file(html) as partial:
            partial.write_text(page(shown), encoding="utf-8")
        say(f"Written: {html}")
    if as_json:
        click.echo(json.dumps(shown.record(), ensure_ascii=False))
    elif html is None:
        from edgetune.cli.explain_page import print_page

        print_page(shown)


def _explain(
    model: str, prompt: str, lora: Sequence[str], engine: str, threads: int, arguments: dict[str, Any], sink: Sink
) -> Explanation:
    from edgetune.library import classify, find_model

    path = find_model(model)
    kind = classify(path)
    if engine == "torch" and path.is_file():
        raise UsageError(f"torch runs Hugging Face directories, and {path} is a GGUF file.", hint="Use --engine llama.")
    is_directory = kind in ("checkpoint", "run")
    if engine == "auto" and is_directory and not _continues_text(path):
        engine = "torch"
    if engine != "torch":
        try:
            return _in_llama(model, prompt, lora, threads, arguments, sink)
        except UnsupportedError as error:
            if engine == "llama" or not is_directory:
                raise
            say(f"{error.message} torch explains it instead.")
    return _in_torch(path, prompt, lora, arguments, sink)


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


def _in_llama(
    model: str, prompt: str, lora: Sequence[str], threads: int, arguments: dict[str, Any], sink: Sink
) -> Explanation:
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.opening import choose_model
    from edgetune.explain.gguf_run import explain_gguf

    choice = choose_model(model, lora, sink=sink)
    speak_before_aborting()
    return explain_gguf(choice.base, prompt, lora=choice.lora, threads=threads, sink=sink, **arguments)


def _in_torch(path: Path, prompt: str, lora: Sequence[str], arguments: dict[str, Any], sink: Sink) -> Explanation:
    from edgetune.explain.checkpoint_run import explain_checkpoint
    from edgetune.library import classify

    adapters = [_peft_directory(value) for value in lora]
    if classify(path) == "run":
        from edgetune.export import find_base_dir

        adapters, path = [(path, 1.0), *adapters], find_base_dir(path)
    return explain_checkpoint(path, prompt, adapters=adapters, sink=sink, **arguments)


def _peft_directory(value: str) -> tuple[Path, float]:
    text, _, scale = value.rpartition(":")
    path, factor = (text, float(scale)) if text and _is_number(scale) else (value, 1.0)
    directory = Path(path).expanduser()
    if not (directory / "adapter_config.json").is_file():
        raise UsageError(
            f"{directory} is not a PEFT directory, which torch needs.", hint="Give the run directory with --lora."
        )
    return directory, factor


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
