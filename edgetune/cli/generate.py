"""`edgetune generate`: one completion, on stdout."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from edgetune.cli.model_options import model_options, open_chosen
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.cli.terminal import read_stdin, valid_text, write_text
from edgetune.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from edgetune.chat import Session
    from edgetune.engine.protocol import Generation


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("arguments", nargs=-1, metavar="[MODEL] PROMPT")
@click.option("--raw", is_flag=True, help="Continue PROMPT as it stands, without the model's chat template.")
@click.option("--system", default="", help="The system prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print an object with text, tokens, finish reason and timings.")
@sampling_options
@model_options
def command(arguments: tuple[str, ...], raw: bool, system: str, as_json: bool, **options: Any) -> int:
    """Complete PROMPT with MODEL and print the text.

    A model with a chat template answers PROMPT as one user turn, without one it continues the text. `-` reads PROMPT
    from standard input. MODEL is a path or a name; left out, it is the base of --lora, or the embedded model.
    """
    model, prompt = _parse(arguments)
    sampling = take_sampling(options)
    max_tokens, stop = options.pop("max_tokens"), options.pop("stop")
    with open_chosen(model, options) as session:
        ids = _prompt_ids(session, prompt, raw=raw, system=system)
        generation = session.engine.generate(ids, sampling, max_tokens=max_tokens, stop=stop)
        interrupted = _run(generation, show=not as_json)
        if as_json:
            click.echo(json.dumps(_as_values(session, generation), ensure_ascii=False))
    return ExitCode.INTERRUPTED if interrupted else ExitCode.OK


def _parse(arguments: tuple[str, ...]) -> tuple[str | None, str]:
    if not arguments and not sys.stdin.isatty():
        return None, _piped()
    if not 1 <= len(arguments) <= 2:
        raise UsageError(
            f"generate takes a model and a prompt; got {len(arguments)} arguments.",
            hint='For example: edgetune generate pocket "What is 2 + 3?"',
        )
    model = arguments[0] if len(arguments) == 2 else None
    prompt = arguments[-1]
    return model, _piped() if prompt == "-" else valid_text(prompt)


def _piped() -> str:
    prompt = read_stdin()
    if not prompt:
        raise UsageError(
            "There is no prompt on standard input.", hint='For example: echo "What is 2 + 3?" | edgetune generate -'
        )
    return prompt


def _prompt_ids(session: Session, prompt: str, *, raw: bool, system: str) -> list[int]:
    template = None if raw else session.template
    if template is None:
        if system:
            raise UsageError("Without a chat template there is no system prompt.", hint="Leave out --system.")
        return session.engine.tokenizer.encode(prompt)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    return session.engine.tokenizer.encode_rendered(template.render(turns, add_generation_prompt=True))


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


def _as_values(session: Session, generation: Generation) -> dict[str, Any]:
    timings = generation.timings
    return {
        "text": generation.text,
        "tokens": generation.ids,
        "finish_reason": generation.finish_reason,
        "model": str(session.engine.path),
        "adapters": [{"path": str(spec.path), "scale": spec.scale} for spec in session.engine.adapters],
        "seed": generation.seed,
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
