"""Commands that show and change how replies are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

from edgetune.chat.adapters import check_scale, find_adapter
from edgetune.chat.budget import Overflow
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.presets import apply_preset, changes, delete_preset, load_presets, save_preset
from edgetune.engine.grammar import grammar_from_json_schema
from edgetune.errors import UsageError

OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
_OVERFLOW_HELP = {
    "drop": "the oldest turns leave it, what stays is evaluated again",
    "shift": "the oldest turns leave it, what stays is kept as it was computed with them",
    "stop": "nothing more is said",
}


def temp(chat: OpenChat, arguments: str) -> Outcome:
    """Show or set the temperature."""
    conversation = chat.conversation
    if arguments:
        conversation.sampling = conversation.sampling.with_setting("temp", arguments)
    return Outcome(f"temp {conversation.sampling.temp:g}")


def set_parameter(chat: OpenChat, arguments: str) -> Outcome:
    """Set a sampling parameter, the limit of a reply, a stop string, or a JSON schema to follow."""
    words, conversation = arguments.split(maxsplit=2), chat.conversation
    if len(words) != 3 or words[0] != "parameter":
        raise UsageError("/set takes: parameter NAME VALUE.", hint="For example: /set parameter temperature 0.7")
    _, name, value = words
    text = "" if value in ("off", '""') else value
    if name in ("num_predict", "predict"):
        conversation.max_tokens = _whole(value)
    elif name == "stop":
        conversation.stop = (text,) if text else ()
    elif name == "json_schema":
        _set_checked(chat, "grammar", grammar_from_json_schema(text) if text else "")
    elif name in ("grammar", "logit_bias"):
        _set_checked(chat, name, text)
    else:
        conversation.sampling = conversation.sampling.with_setting(name, value)
    return Outcome(f"{name} {value}")


def preset(chat: OpenChat, arguments: str) -> Outcome:
    """Show, apply, save or delete presets."""
    conversation, model = chat.conversation, chat.session.name
    verb, _, name = arguments.partition(" ")
    if not arguments:
        return Outcome(rows=tuple((name, _settings(values)) for name, values in load_presets(model).items()))
    if verb in ("save", "delete") and name.strip():
        if verb == "delete":
            delete_preset(name.strip(), model=model)
            return Outcome(f"Preset {name.strip()} deleted.")
        save_preset(name.strip(), conversation.sampling, model=model)
        return Outcome(f"Preset {name.strip()} saved for {model}.")
    conversation.sampling = apply_preset(arguments, conversation.sampling, model=model)
    return Outcome(_settings(changes(conversation.sampling)))


def show(chat: OpenChat, arguments: str) -> Outcome:
    """Show what is in force."""
    engine, conversation = chat.session.engine, chat.conversation
    branches, thinking = conversation.tree.leaves(), conversation.thinking
    rows = [
        ("model", str(engine.path)),
        ("adapters", describe_adapters(chat)),
        ("context", f"{engine.cached_tokens} of {engine.context_size} tokens; when full: {conversation.overflow}"),
        ("turns", str(sum(message["role"] == "user" for message in conversation.messages))),
        ("system", conversation.system or "the template's own"),
        ("sampling", _settings(changes(conversation.sampling))),
    ]
    if len(branches) > 1:
        rows.append(("branches", str(len(branches))))
    if conversation.max_tokens >= 0:
        rows.append(("limit", f"{conversation.max_tokens} new tokens a reply"))
    if thinking:
        rows.append(("reasoning", f"{thinking.start} … {thinking.end}"))
    if chat.autosave is not None:
        rows.append(("saved", str(chat.autosave.problem or f"{chat.autosave.session_id[:8]} in {chat.database.path}")))
    return Outcome(rows=tuple(rows))


def lora(chat: OpenChat, arguments: str) -> Outcome:
    """Show, apply, scale or switch off adapters."""
    session = chat.session
    name, _, value = arguments.rpartition(" ")
    if not name:
        name, value = arguments, ""
    name, value = name.strip(), value.strip()
    if name == "off" and not value:
        session.switch_off()
    elif value == "off":
        session.switch_off(name)
    elif name:
        _apply_lora(chat, name, value)
    chat.conversation.template = session.template or chat.conversation.template
    return Outcome(describe_adapters(chat))


def describe_adapters(chat: OpenChat) -> str:
    """The adapters by name and scale, on one line."""
    names = chat.session.adapter_names().items()
    return ", ".join(f"{name} {f'{spec.scale:g}' if spec.scale else 'off'}" for name, spec in names) or "no adapter"


def system(chat: OpenChat, arguments: str) -> Outcome:
    """Show, set or remove the system prompt."""
    if arguments:
        chat.conversation.system = "" if arguments in ('""', "off") else arguments
    return Outcome(chat.conversation.system or "The template's own system prompt.")


def overflow(chat: OpenChat, arguments: str) -> Outcome:
    """Show or set what happens when the context is full."""
    if arguments:
        found = next((policy for policy in OVERFLOWS if policy == arguments), None)
        if found is None:
            raise UsageError(f"{arguments!r} is none of {', '.join(OVERFLOWS)}.")
        chat.conversation.overflow = found
    forecast = chat.conversation.forecast()
    mine = chat.conversation.overflow
    return Outcome(
        f"The next message begins at {forecast.tokens} of {forecast.size} tokens; beyond {forecast.room}, so that"
        f" a reply has space, {_OVERFLOW_HELP[mine]} ({mine})."
    )


def tools(chat: OpenChat, arguments: str) -> Outcome:
    """Show, read or remove the functions that the model is told about."""
    conversation = chat.conversation
    if arguments == "off":
        conversation.tools = ()
    elif arguments:
        conversation.tools = tuple(_read_tools(Path(arguments).expanduser()))
    names = [str(tool.get("function", tool).get("name", "?")) for tool in conversation.tools]
    return Outcome(f"The model may call: {', '.join(names)}." if names else "The model is told of no functions.")


def _read_tools(path: Path) -> list[dict[str, object]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise UsageError(f"{path} holds no list of functions.", hint="It has to be a JSON list as OpenAI's `tools`.")
    return values


def _apply_lora(chat: OpenChat, name: str, value: str) -> None:
    try:
        scale = check_scale(float(value)) if value else None
    except ValueError:
        raise UsageError(f"{value!r} is no scale.", hint="For example: /lora NAME 0.5, or /lora NAME off") from None
    known = chat.session.adapter_names().get(name)
    found = known or find_adapter(name)
    given = found.scale if known is None else 1.0
    chat.session.set_adapter(found.path, given if scale is None else scale)


def _settings(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "llama.cpp's defaults"


def _set_checked(chat: OpenChat, name: str, value: str) -> None:
    """Set what only llama.cpp can tell to be wrong: now, and not with the next message."""
    sampling = chat.conversation.sampling.with_setting(name, value)
    chat.session.engine.build_sampler(sampling, ()).close()
    chat.conversation.sampling = sampling


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{text!r} is no whole number.") from None
