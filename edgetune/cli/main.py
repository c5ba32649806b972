"""The entry point: the group of lazily loaded verbs, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from edgetune import __version__
from edgetune.errors import EdgetuneError, ExitCode
from edgetune.event_lines import EVENTS_VARIABLE

VERBS: dict[str, tuple[str, str]] = {
    "train": ("edgetune.cli.train", "Train an adapter on your data."),
    "convert": ("edgetune.cli.convert", "Convert a model or an adapter to GGUF, and prove it."),
    "quantize": ("edgetune.cli.quantize", "Quantize a GGUF file."),
    "verify": ("edgetune.cli.verify", "Prove that a GGUF equals the model it came from."),
    "chat": ("edgetune.cli.chat", "Chat with a model and its adapters."),
    "generate": ("edgetune.cli.generate", "Complete one prompt."),
    "embed": ("edgetune.cli.embed", "Turn texts into vectors."),
    "classify": ("edgetune.cli.classify", "Give texts labels or numbers."),
    "explain": ("edgetune.cli.explain", "Follow a prompt through a model, step by step."),
    "tokenize": ("edgetune.cli.tokenize", "Show a text's token ids and pieces."),
    "plan": ("edgetune.cli.plan", "Say what training would take here."),
    "bench": ("edgetune.cli.bench", "Measure how fast a model is here."),
    "models": ("edgetune.cli.models", "List, show and remove models on this machine."),
    "doctor": ("edgetune.cli.doctor", "Show what works on this machine."),
}
"""Verb → (module, one-line help). Each module holds a click command named `command`; `--help` imports none of them."""


class LazyGroup(click.Group):
    """A group that imports a verb's module when the verb is called, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(VERBS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader of our stdout went away; there is nobody to tell, and click would call it a failure.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return ExitCode.OK

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            if close := get_close_matches(args[0], VERBS, n=1):
                raise click.UsageError(f"{error.message} Did you mean '{close[0]}'?", ctx) from error
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in VERBS.items()])


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgetune")
@click.pass_context
def edgetune(ctx: click.Context) -> None:
    """Adapt a language model on your own machine and run it there, offline.

    Without a command, on a terminal: a screen with what is on this machine, and what can be done with it.
    """
    if ctx.invoked_subcommand is not None:
        return
    from edgetune.cli.terminal import is_full_screen

    if not is_full_screen():
        raise click.exceptions.NoArgsIsHelpError(ctx)
    from edgetune.cli.home import show_home

    show_home()


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with an `ExitCode`."""
    _leave_in_order()
    _open_streams()
    _keep_libraries_quiet()
    sys.exit(run(args))


def _keep_libraries_quiet() -> None:
    """Nothing but a download that was asked for may reach the network, or write to a person's screen unasked."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Loaded along with PEFT, it looks for faster kernels on the Hugging Face hub and complains that it may not.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error becomes one message on stderr."""
    try:
        result: Any = edgetune.main(
            args=list(args) if args is not None else None, prog_name="edgetune", standalone_mode=False
        )
        return int(result) if isinstance(result, int) else ExitCode.OK
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # click makes the one of the other; what it raises by itself has been talked about.
        if KeyboardInterrupt in (type(error), type(error.__cause__)):
            _say("Interrupted.")
        return ExitCode.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(file=sys.stderr)
        return ExitCode.USAGE
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        _say(error.format_message(), f"{context.command_path} --help" if context else "")
        return ExitCode.USAGE
    except EdgetuneError as error:
        _say(error.message, error.hint)
        return error.exit_code
    except MemoryError:
        _say("Out of memory.", "Use a smaller model, quant type, context or batch.")
        return ExitCode.RESOURCES
    except OSError as error:
        return _os_error(error)
    except Exception as error:  # noqa: BLE001 - the outermost handler: a mistake of ours is a message as well
        _say_mistake(error)
        return ExitCode.FAILED


def _leave_in_order() -> None:
    """Let the signals that ask a process to end unwind it like an error, so that half-written files are removed."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(ExitCode.INTERRUPTED)

    if EVENTS_VARIABLE in os.environ and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A stage is stopped by this signal, also under a parent that was told to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # What nohup ignores stays ignored.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)


def _open_streams() -> None:
    """Let no closed stream, no locale and no file name that is not UTF-8 turn a message into an error."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - for as long as we run
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "replace")


def _os_error(error: OSError) -> ExitCode:
    import errno

    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        _say(f"The disk is full{where}.", "Free some space, or write elsewhere.")
        return ExitCode.RESOURCES
    if error.errno == errno.ENOMEM:
        _say("Out of memory.", "Use a smaller model, quant type, context or batch.")
        return ExitCode.RESOURCES
    _say(f"{error.strerror or error}{where}.")
    return ExitCode.FAILED


def _say_mistake(error: Exception) -> None:
    import tempfile
    import traceback

    # Locals and data stay out of it: people send such files to strangers.
    with tempfile.NamedTemporaryFile("w", prefix="edgetune-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"edgetune {__version__}, Python {sys.version}\n\n{''.join(traceback.format_exception(error))}")
    reason = " ".join(str(error).split())
    _say(
        f"edgetune did not expect this: {type(error).__name__}{f': {reason}' if reason else ''}.",
        f"This is a mistake in edgetune, or a file damaged in a way nobody thought of; where it happened: {file.name}",
    )


def _say(message: str, hint: str = "") -> None:
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    from edgetune.cli.terminal import plain

    click.secho(f"error: {plain(message)}", err=True, fg="red" if color else None)
    if hint:
        click.secho(f"hint:  {plain(hint)}", err=True)
