"""`edgetune generate`: a completion, or the answers of an encoder-decoder to texts, on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgetune.cli.model_options import MODEL_OPTIONS, model_options
from edgetune.cli.progress import say, show_progress
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.cli.seq2seq_prompt import prompting_options, take_prompting
from edgetune.cli.terminal import read_stdin, valid_text, write_text
from edgetune.errors import DataError, ExitCode, UsageError
from edgetune.events import Progress, Sink

if TYPE_CHECKING:
    from edgetune.cli.text_rows import TextRow
    from edgetune.engine.protocol import Generation
    from edgetune.opening.answers import Answers
    from edgetune.opening.prompting import Prompting
    from edgetune.opening.writers import Writer

_EARLY = {"true": True, "false": False, "never": "never"}


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("arguments", nargs=-1, metavar="[MODEL] PROMPT")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it stands, without the model's chat template.")
@click.option("--system", default="", help="The system prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print an object with text, tokens, finish reason and timings.")
@click.option(
    "--lines/--whole", default=None,
    help="Answer each line of - or of a FILE by itself, or all of it as one text. [default: --lines for "
    "encoder-decoders]",
)  # fmt: skip
@click.option("--skip-bad", is_flag=True, help="Leave out lines that cannot be read, are empty or are too long.")
@click.option(
    "--engine", type=click.Choice(["auto", "llama", "torch"]), default="auto", show_default=True,
    help="llama.cpp, or torch for a Hugging Face directory or a run; auto is llama.cpp where it has the graph.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["auto", "f32", "bf16", "int8"]), default="auto", show_default=True,
    help="What torch computes in; auto is bf16 for weights stored so, else f32.",
)  # fmt: skip
@click.option(
    "--num-beams",
    type=click.IntRange(1, 64),
    help="Search the likeliest text with so many beams instead of sampling. [default: what the model asks for, or 1]",
)
@click.option("--length-penalty", type=float, help="Of a beam search: above 0 favours longer texts. [default: 1]")
@click.option(
    "--early-stopping", type=click.Choice(list(_EARLY)),
    help="Of a beam search: end with as many texts as beams, when a better one is unlikely, or impossible. "
    "[default: false]",
)  # fmt: skip
@prompting_options
@sampling_options
@model_options
def command(
    arguments: tuple[str, ...],
    raw: bool,
    system: str,
    as_json: bool,
    lines: bool | None,
    skip_bad: bool,
    **options: Any,
) -> int:
    """Complete PROMPT with MODEL, or answer it, and print the text.

    A model with a chat template answers PROMPT as one user turn, without one it continues the text. `-` reads PROMPT
    from standard input. MODEL is a path or a name; left out, it is the base of --lora, or the embedded model.

    An encoder-decoder (T5; BART, mBART, bert2BERT in torch) answers PROMPT, or each line of `-` or of a FILE. It takes
    the likeliest token each time unless a sampling flag says otherwise.
    """
    given = _given()
    model, prompt = _parse(arguments)
    sampling, prompting = take_sampling(options), take_prompting(options)
    beams = {name: options.pop(name) for name in ("num_beams", "length_penalty", "early_stopping")}
    max_tokens, stop = options.pop("max_tokens"), options.pop("stop")
    if prompt == "-" and sys.stdin.isatty():
        raise UsageError("There is no prompt on standard input.", hint='For example: edgetune generate "2 + 3 ="')
    open_one = _open(model, options, given=given)
    beams = {name: value for name, value in beams.items() if value is not None}
    if "early_stopping" in beams:
        beams["early_stopping"] = _EARLY[beams["early_stopping"]]
    with open_one.engine:
        from edgetune.opening.answers import Answers

        answers = Answers(
            open_one,
            sampling,
            asked=given,
            beams=beams,
            max_tokens=max_tokens,
            stop=stop,
            prompting=prompting,
            raw=raw,
            system=system,
        )
        for notice in answers.notices:
            say(notice)
        by_line = open_one.is_encoder_decoder if lines is None else lines
        rows = _rows(prompt, lines=by_line, prompting=prompting, skip_bad=skip_bad)
        interrupted = _answer_all(answers, rows, as_json=as_json, skip_bad=skip_bad)
    return ExitCode.INTERRUPTED if interrupted else ExitCode.OK


def _open(model: str | None, options: dict[str, Any], *, given: frozenset[str]) -> Writer:
    from edgetune.cli.last_words import speak_before_aborting
    from edgetune.opening.writers import open_writer

    # What nobody asked for is left to the engine that comes out, which may not know it.
    always = {"ctx_size", "threads", "force", "engine", "dtype"}
    taken = {name: options.pop(name) for name in (*MODEL_OPTIONS, "engine", "dtype")}
    speak_before_aborting()
    with show_progress() as sink:
        lora = taken.pop("lora")
        return open_writer(
            model, lora, sink=sink, **{name: value for name, value in taken.items() if name in given | always}
        )


def _given() -> frozenset[str]:
    """Names of the options that were typed."""
    context = click.get_current_context()
    return frozenset(
        name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    )


def _parse(arguments: tuple[str, ...]) -> tuple[str | None, str]:
    """MODEL and PROMPT as they were given; `-` where the prompt is piped in."""
    if not arguments and not sys.stdin.isatty():
        return None, "-"
    if not 1 <= len(arguments) <= 2:
        raise UsageError(
            f"generate takes a model and a prompt; got {len(arguments)} arguments.",
            hint='For example: edgetune generate pocket "What is 2 + 3?"',
        )
    return (arguments[0] if len(arguments) == 2 else None), arguments[-1]


def _rows(prompt: str, *, lines: bool, prompting: Prompting, skip_bad: bool) -> Sequence[TextRow]:
    from edgetune.cli.text_rows import TextRow, read_rows

    if lines:
        has_pairs = prompting.task == "qa" and not prompting.context
        return read_rows((prompt,), pair=has_pairs, skip_bad=skip_bad)
    text = read_stdin() if prompt == "-" else valid_text(prompt)
    if prompt == "-" and not text:
        raise UsageError(
            "There is no prompt on standard input.", hint='For example: echo "What is 2 + 3?" | edgetune generate -'
        )
    return [TextRow("the prompt", text)]


def _answer_all(answers: Answers, rows: Sequence[TextRow], *, as_json: bool, skip_bad: bool) -> bool:
    """Answer `rows` in order; returns whether the user stopped it."""
    from edgetune.opening.answers import AT_ONCE

    if len(rows) == 1:
        generation = answers.begin(rows[0].text)
        interrupted = _run(generation, show=not as_json)
        if as_json:
            click.echo(json.dumps(_as_values(answers.model, generation), ensure_ascii=False))
        return interrupted
    with show_progress() as sink:
        size = AT_ONCE if answers.model.is_encoder_decoder else 1
        for start in range(0, len(rows), size):
            begun = _begin(answers, rows[start : start + size], skip_bad=skip_bad)
            if _run_together(answers.model, begun, as_json=as_json, sink=_counting(sink, start, len(rows))):
                return True
    return False


def _begin(answers: Answers, rows: Sequence[TextRow], *, skip_bad: bool) -> list[tuple[TextRow, Generation]]:
    begun: list[tuple[TextRow, Generation]] = []
    for row in rows:
        try:
            begun.append((row, answers.begin(row.text)))
        except UsageError as error:
            if not skip_bad:
                raise DataError(f"{row.place}: {error.message}", hint=error.hint) from error
            say(f"skipped: {row.place}: {error.message}", warning=True)
    return begun


def _run_together(
    model: Writer, begun: Sequence[tuple[TextRow, Generation]], *, as_json: bool, sink: Callable[[int], None]
) -> bool:
    """Let all run to their ends and print each when those before it are printed; whether the user stopped it."""
    replies = [generation for _, generation in begun]
    printed = 0
    try:
        for _ in chain(model.engine.run_together(replies), [None]):
            while printed < len(replies) and replies[printed].finish_reason:
                _print_row(model, *begun[printed], as_json=as_json)
                printed += 1
            sink(sum(one.finish_reason is not None for one in replies))
    except KeyboardInterrupt:
        for one in replies:
            one.close()
    return any(one.finish_reason == "interrupted" for one in replies)


def _print_row(model: Writer, row: TextRow, generation: Generation, *, as_json: bool) -> None:
    values = {**row.values(), **_as_values(model, generation)}
    # An answer a line: one that has several would come apart.
    answer = json.dumps(values, ensure_ascii=False) if as_json else " ".join(generation.text.split("\n"))
    write_text(f"{answer}\n")


def _counting(sink: Sink, start: int, total: int) -> Callable[[int], None]:
    """What tells how many of the texts from `start` on are answered; answers on the terminal tell it themselves."""
    if sys.stdout.isatty():
        return lambda done: None
    return lambda done: sink(Progress("generate", start + done, total, "texts"))


def _run(generation: Generation, *, show: bool) -> bool:
    """Let it run to its end; returns whether the user stopped it."""
    try:
        for text in generation:
            if show:
                write_text(text)
    except KeyboardInterrupt:
        generation.close()
    if show and not generation.text.endswith("\n"):
        click.echo()
    return generation.finish_reason == "interrupted"


def _as_values(model: Writer, generation: Generation) -> dict[str, Any]:
    timings = generation.timings
    score = getattr(generation, "score", None)
    return {
        "text": generation.text,
        "tokens": generation.ids,
        "finish_reason": generation.finish_reason,
        "model": str(model.engine.path),
        "engine": model.name,
        "adapters": [{"path": str(spec.path), "scale": spec.scale} for spec in model.engine.adapters],
        "seed": generation.seed,
        **({} if score is None else {"score": score}),
        "timings": {
            "prompt_tokens": timings.prompt_tokens,
            "prompt_seconds": timings.prompt_seconds,
            "prompt_tokens_per_second": timings.prompt_per_second,
            "generated_tokens": timings.generated_tokens,
            "generated_seconds": timings.generated_seconds,
            "tokens_per_second": timings.tokens_per_second,
            "first_token_seconds": timings.first_token_seconds,
        },
    }
