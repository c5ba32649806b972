"""`edgetune chat`: talk with a model and its adapters, in line mode; from a pipe, one message and its reply."""

from __future__ import annotations

import sys
from typing import Any

import click

from edgetune.cli.model_options import model_options, open_chosen
from edgetune.cli.sampling_options import sampling_options, take_sampling
from edgetune.errors import ExitCode


@click.command("chat", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--plain", is_flag=True, help="Line mode: no full-screen interface.")
@click.option("--system", default="", help="The system prompt.")
@sampling_options
@model_options
def command(model: str | None, plain: bool, system: str, **options: Any) -> int:
    """Chat with MODEL, a path or a name; left out, it is the base of --lora, or the embedded model.

    Type /help for the commands. When standard input is a pipe, all of it is one message, and the reply is printed.
    """
    # Line mode is the only one so far; --plain asks for it in scripts that must not change with it.
    from edgetune.chat import Conversation
    from edgetune.cli.line_mode import run_line_mode, run_piped

    sampling = take_sampling(options)
    max_tokens, stop = options.pop("max_tokens"), options.pop("stop")
    with open_chosen(model, options) as session:
        conversation = Conversation(
            session.engine,
            template=session.template,
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
        )
        if sys.stdin.isatty():
            run_line_mode(session, conversation)
            return ExitCode.OK
        return ExitCode.INTERRUPTED if run_piped(conversation) else ExitCode.OK
