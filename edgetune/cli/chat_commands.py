"""The commands of the chat loop: one table that runs them, lists them in /help and completes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edgetune.chat import Conversation, Reply, SavedChat, Session, load_chat, save_chat
from edgetune.chat.store import chat_path
from edgetune.cli.model_options import find_adapter
from edgetune.cli.terminal import say_dim, say_rows
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError


class Leave(Exception):
    """The user wants to leave the chat."""


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    name: str
    arguments: str
    """As /help shows them."""
    help: str
    run: Callable[[Session, Conversation, str], Reply | None]
    """Gets what follows the name; returns a reply to show, if the command makes one."""


def run_command(session: Session, conversation: Conversation, line: str) -> Reply | None:
    """Run the command on `line`. Raises `UsageError` for an unknown one, `Leave` for /bye."""
    name, _, arguments = line[1:].strip().partition(" ")
    matching = [command for command in COMMANDS if command.name == name] or [
        command for command in COMMANDS if name and command.name.startswith(name)
    ]
    if len(matching) != 1:
        raise UsageError(f"There is no command /{name}.", hint="/help lists them.")
    return matching[0].run(session, conversation, arguments.strip())


def complete(session: Session, text: str) -> Iterator[tuple[str, int]]:
    """What could follow `text`: (word, how many characters of it are typed already)."""
    if not text.startswith("/") or "\n" in text:
        return
    words = text.split(" ")
    choices = {
        1: [f"/{command.name}" for command in COMMANDS],
        2: {"/lora": [*session.adapter_names(), "off"], "/set": ["parameter"]}.get(words[0], []),
        3: {"/set": [field.name for field in fields(Sampling)], "/lora": ["off"]}.get(words[0], []),
    }.get(len(words), [])
    for choice in choices:
        if choice.startswith(words[-1]) and choice != words[-1]:
            yield choice, len(words[-1])


def _temp(session: Session, conversation: Conversation, arguments: str) -> None:
    if arguments:
        conversation.sampling = conversation.sampling.with_setting("temp", arguments)
    say_dim(f"temp {conversation.sampling.temp:g}")


def _set(session: Session, conversation: Conversation, arguments: str) -> None:
    words = arguments.split(maxsplit=2)
    if len(words) != 3 or words[0] != "parameter":
        raise UsageError("/set takes: parameter NAME VALUE.", hint="For example: /set parameter temperature 0.7")
    if words[1] in ("num_predict", "predict"):
        conversation.max_tokens = _whole(words[2])
    elif words[1] == "stop":
        conversation.stop = (words[2],)
    else:
        conversation.sampling = conversation.sampling.with_setting(words[1], words[2])
    say_dim(f"{words[1]} {words[2]}")


def _show(session: Session, conversation: Conversation, arguments: str) -> None:
    engine, default = session.engine, asdict(Sampling())
    changed = {name: value for name, value in asdict(conversation.sampling).items() if value != default[name]}
    rows = [
        ("model", str(engine.path)),
        ("adapters", _adapters(session)),
        ("context", f"{engine.cached_tokens} of {engine.context_size} tokens"),
        ("turns", str(sum(message["role"] == "user" for message in conversation.messages))),
        ("system", conversation.system or "the template's own"),
        ("sampling", ", ".join(f"{name} {value}" for name, value in changed.items()) or "llama.cpp's defaults"),
    ]
    if conversation.max_tokens >= 0:
        rows.append(("limit", f"{conversation.max_tokens} new tokens a reply"))
    say_rows(rows)


def _lora(session: Session, conversation: Conversation, arguments: str) -> None:
    name, _, value = arguments.rpartition(" ")
    if not name:
        name, value = arguments, ""
    name, value = name.strip(), value.strip()
    if name == "off" and not value:
        session.switch_off()
    elif value == "off":
        session.switch_off(name)
    elif name:
        _apply_lora(session, name, value)
    conversation.template = session.template or conversation.template
    say_dim(_adapters(session))


def _apply_lora(session: Session, name: str, value: str) -> None:
    try:
        scale = float(value) if value else None
    except ValueError:
        raise UsageError(f"{value!r} is no scale.", hint="For example: /lora NAME 0.5, or /lora NAME off") from None
    known = session.adapter_names().get(name)
    found = known or find_adapter(name)
    given = found.scale if known is None else 1.0
    session.set_adapter(found.path, given if scale is None else scale)


def _system(session: Session, conversation: Conversation, arguments: str) -> None:
    if arguments:
        conversation.system = "" if arguments in ('""', "off") else arguments
    say_dim(conversation.system or "The template's own system prompt.")


def _retry(session: Session, conversation: Conversation, arguments: str) -> Reply:
    return conversation.retry()


def _undo(session: Session, conversation: Conversation, arguments: str) -> None:
    say_dim(f"Taken back: {conversation.undo()}")


def _clear(session: Session, conversation: Conversation, arguments: str) -> None:
    conversation.clear()
    say_dim("Everything said is forgotten.")


def _save(session: Session, conversation: Conversation, arguments: str) -> None:
    if not arguments:
        raise UsageError("/save takes a name or a path.", hint="For example: /save notes")
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    path = chat_path(arguments)
    chat = SavedChat(
        messages=[*system, *conversation.messages],
        sampling=asdict(conversation.sampling),
        model=str(session.engine.path),
        adapters=[{"path": str(adapter.path), "scale": adapter.scale} for adapter in session.engine.adapters],
    )
    save_chat(path, chat)
    say_dim(f"Saved to {path}")


def _load(session: Session, conversation: Conversation, arguments: str) -> None:
    if not arguments:
        raise UsageError("/load takes a name or a path.", hint="For example: /load notes")
    chat = load_chat(chat_path(arguments))
    conversation.sampling = chat.apply_sampling(conversation.sampling)
    conversation.replace(chat.messages)
    say_dim(f"Loaded {len(conversation.messages)} messages.")
    here = {str(adapter.path) for adapter in session.engine.adapters}
    missing = [Path(adapter["path"]) for adapter in chat.adapters if adapter.get("path") not in here]
    for path in missing:
        say_dim(f"It was held with the adapter {path}: /lora {path}")


def _help(session: Session, conversation: Conversation, arguments: str) -> None:
    say_rows((f"/{command.name} {command.arguments}".rstrip(), command.help) for command in COMMANDS)
    say_rows(
        [
            ('""" … """', "A message over several lines; Alt-Enter makes a line as well."),
            ("Ctrl-C", "Stop the reply and keep what was said."),
            ("Ctrl-D", "Leave."),
        ]
    )


def _bye(session: Session, conversation: Conversation, arguments: str) -> None:
    raise Leave


def _adapters(session: Session) -> str:
    names = session.adapter_names().items()
    return ", ".join(f"{name} {f'{spec.scale:g}' if spec.scale else 'off'}" for name, spec in names) or "no adapter"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is no whole number.") from None


COMMANDS: tuple[Command, ...] = (
    Command("temp", "[VALUE]", "Show or set the temperature.", _temp),
    Command("set", "parameter NAME VALUE", "Set a sampling parameter, by llama.cpp's name.", _set),
    Command("show", "", "Show model, adapters, context, system prompt and sampling.", _show),
    Command("lora", "[NAME [SCALE] | off]", "Show, apply, scale or switch off adapters.", _lora),
    Command("system", "[TEXT | off]", "Show, set or remove the system prompt.", _system),
    Command("retry", "", "Answer the last message again.", _retry),
    Command("undo", "", "Take back the last message and its reply.", _undo),
    Command("save", "NAME", "Save the conversation and its settings.", _save),
    Command("load", "NAME", "Load a saved conversation.", _load),
    Command("clear", "", "Forget everything said.", _clear),
    Command("help", "", "Show this.", _help),
    Command("bye", "", "Leave.", _bye),
)
"""Every command, in the order of /help."""
