"""The commands of a chat: one table that runs them, lists them in /help, completes them, and is their page in the docs.

A command returns what it did as an `Outcome`; showing it is the front end's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from edgetune.chat import history_commands, session_commands, setting_commands, token_commands
from edgetune.chat.attachments import path_start
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.presets import load_presets
from edgetune.chat.templates import template_names
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError

Choices = Callable[[OpenChat, Sequence[str]], Sequence[str]]


def _none(chat: OpenChat, words: Sequence[str]) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    name: str
    arguments: str
    """As /help shows them."""
    help: str
    run: Callable[[OpenChat, str], Outcome]
    """Gets what follows the name."""
    choices: Choices = _none
    """What may stand after the words (of the arguments) that are complete."""


def run_command(chat: OpenChat, line: str) -> Outcome:
    """Run the command on `line`. Raises `UsageError` for an unknown one."""
    name, _, arguments = line[1:].strip().partition(" ")
    matching = [command for command in COMMANDS if command.name == name] or [
        command for command in COMMANDS if name and command.name.startswith(name)
    ]
    if len(matching) != 1:
        hint = f"It could be: {', '.join(f'/{one.name}' for one in matching)}." if matching else "/help lists them."
        raise UsageError(f"There is no command /{name}.", hint=hint)
    return matching[0].run(chat, arguments.strip())


def complete(chat: OpenChat, text: str) -> Iterator[tuple[str, int]]:
    """What could follow `text`: (word, how many characters of it are typed already)."""
    if (start := path_start(text)) is not None:
        yield from ((path, len(start)) for path in _paths(start))
    if not text.startswith("/") or "\n" in text:
        return
    words = text.split(" ")
    if len(words) == 1:
        choices: Sequence[str] = [f"/{command.name}" for command in COMMANDS]
    else:
        command = next((command for command in COMMANDS if f"/{command.name}" == words[0]), None)
        choices = command.choices(chat, words[1:-1]) if command else ()
    for choice in choices:
        if choice.startswith(words[-1]) and choice != words[-1]:
            yield choice, len(words[-1])


def command_rows() -> list[tuple[str, str]]:
    """(command with its arguments, help) for every command."""
    return [(f"/{command.name} {command.arguments}".rstrip(), command.help) for command in COMMANDS]


def commands_page() -> str:
    """The commands as a page of the docs."""
    rows = [f"| `{name.replace('|', chr(92) + '|')}` | {text} |" for name, text in command_rows()]
    return "\n".join(["# Commands of `edgetune chat`", "", "| command | does |", "|---|---|", *rows, ""])


def _help(chat: OpenChat, arguments: str) -> Outcome:
    return Outcome(rows=(*command_rows(), ("@PATH", "In a message: attach that text file."), *chat.keys))


def _bye(chat: OpenChat, arguments: str) -> Outcome:
    return Outcome(leaves=True)


def _paths(start: str) -> list[str]:
    """Files and directories that `start` may become; directories end with a slash."""
    head, slash, tail = start.rpartition("/")
    directory = Path(f"{head}{slash}" or ".").expanduser()
    try:
        found = sorted(path for path in directory.iterdir() if path.name.startswith(tail))
    except OSError:
        return []
    shown = [path for path in found if tail.startswith(".") or not path.name.startswith(".")]
    return [f"{head}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in shown]


def _first(*words: str) -> Choices:
    return lambda chat, done: words if not done else ()


def _lora_choices(chat: OpenChat, done: Sequence[str]) -> Sequence[str]:
    return {0: [*chat.session.adapter_names(), "off"], 1: ["off"]}.get(len(done), [])


def _set_choices(chat: OpenChat, done: Sequence[str]) -> Sequence[str]:
    names = [*(field.name for field in fields(Sampling)), "predict", "stop", "json_schema"]
    return {0: ["parameter"], 1: names}.get(len(done), [])


def _preset_choices(chat: OpenChat, done: Sequence[str]) -> Sequence[str]:
    names = list(load_presets(chat.session.name))
    return [*names, "save", "delete"] if not done else names if list(done) == ["delete"] else []


def _template_choices(chat: OpenChat, done: Sequence[str]) -> Sequence[str]:
    return [*template_names(), "save", "delete"] if not done else template_names() if list(done) == ["delete"] else []


def _session_choices(chat: OpenChat, done: Sequence[str]) -> Sequence[str]:
    return [saved.id[:8] for saved in chat.database.sessions(limit=50)] if chat.autosave and not done else []


COMMANDS: tuple[Command, ...] = (
    Command("temp", "[VALUE]", "Show or set the temperature.", setting_commands.temp),
    Command(
        "set",
        "parameter NAME VALUE",
        "Set a sampling parameter, by llama.cpp's name, predict, stop or json_schema; texts are taken back by off.",
        setting_commands.set_parameter,
        _set_choices,
    ),
    Command(
        "preset",
        "[NAME | save NAME]",
        "Show, apply, save or delete NAME, a set of sampling parameters.",
        setting_commands.preset,
        _preset_choices,
    ),
    Command("show", "", "Show model, adapters, context, system prompt and sampling.", setting_commands.show),
    Command(
        "lora",
        "[NAME [SCALE] | off]",
        "Show, apply, scale or switch off adapters.",
        setting_commands.lora,
        _lora_choices,
    ),
    Command("system", "[TEXT | off]", "Show, set or remove the system prompt.", setting_commands.system, _first("off")),
    Command(
        "overflow",
        "[POLICY]",
        "Show or set what happens when the context is full: drop, shift or stop.",
        setting_commands.overflow,
        _first(*setting_commands.OVERFLOWS),
    ),
    Command(
        "template",
        "[NAME [TEXT]]",
        "List prompt templates, or say one, with TEXT for its {input}; save NAME TEXT makes one.",
        history_commands.template,
        _template_choices,
    ),
    Command("retry", "", "Answer the last message again; the old reply stays on a branch.", history_commands.retry),
    Command("undo", "", "Go back before the last message and its reply.", history_commands.undo),
    Command(
        "edit",
        "[reply] [TEXT]",
        "Put TEXT in the place of the last message, or of the reply to it.",
        history_commands.edit,
        _first("reply"),
    ),
    Command(
        "branch",
        "[NUMBER | from TEXT | TOKEN ALTERNATIVE]",
        "List the branches, go to one, let the last reply begin with TEXT, or go on from another token of it.",
        history_commands.branch,
        _first("from"),
    ),
    Command(
        "alternatives",
        "[NUMBER]",
        "List the least sure tokens of the last reply, and what else was likely there, for /branch.",
        token_commands.alternatives,
    ),
    Command(
        "vote",
        "up | down | off",
        "Mark the last reply as good or bad, for /export rows, pairs and verdicts.",
        history_commands.vote,
        _first("up", "down", "off"),
    ),
    Command("tool", "TEXT", "Answer a tool call of the model by hand.", history_commands.tool),
    Command("tools", "[FILE | off]", "Tell the model which functions it may call.", setting_commands.tools),
    Command("sessions", "[delete ID]", "List the chats that are kept.", session_commands.sessions, _first("delete")),
    Command("search", "WORDS", "Find messages in all chats.", session_commands.search),
    Command("resume", "[ID]", "Go on with a chat, the last one by default.", session_commands.resume, _session_choices),
    Command("title", "[TEXT]", "Show or set the title of this chat.", session_commands.title),
    Command(
        "export",
        "[KIND] FILE",
        "Write the chat as markdown or jsonl, or the replies that were voted on as rows, pairs or verdicts.",
        session_commands.export_chat,
        _first(*session_commands.EXPORTS),
    ),
    Command("save", "NAME", "Save the conversation and its settings in a file.", session_commands.save),
    Command("load", "NAME", "Load a saved conversation.", session_commands.load),
    Command("clear", "", "Begin anew; settings stay.", history_commands.clear),
    Command("help", "", "Show this.", _help),
    Command("bye", "", "Leave.", _bye),
)
"""Every command, in the order of /help."""
