"""Conversations as rows spell them → messages as chat templates take them, checked turn by turn.

OpenAI's message lists and ShareGPT's from/value lists, with tool calls in both. Part of the data path under `formats`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
"""What a message's role may be; "developer" reads as system, "function" as tool."""

_ROLE_ALIASES = {"developer": "system", "function": "tool"}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


class RowError(ValueError):
    """A row is not what its format says; carries what was expected and what was found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")


def describe(value: Any) -> str:
    """A value for an error message: short, with its JSON type."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    return names.get(type(value), type(value).__name__)


def read_messages(value: Any) -> list[dict[str, Any]]:
    """OpenAI chat messages → messages for a template. Raises `RowError`."""
    if not isinstance(value, list | tuple) or not value:
        raise RowError("a list of messages", describe(value) if value else "an empty one")
    return [_read_message(message, f"message {number}") for number, message in enumerate(value, 1)]


def read_sharegpt(value: Any) -> list[dict[str, Any]]:
    """ShareGPT turns (from, value) → messages for a template. Raises `RowError`."""
    if not isinstance(value, list | tuple) or not value:
        raise RowError("a list of turns", describe(value) if value else "an empty one")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            found = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else describe(turn)
            raise RowError(f"'from' and 'value' in turn {number}", found)
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RowError(f"human, gpt, system, function_call or observation in turn {number}", describe(turn["from"]))
        if role == "call":
            calls = _called(turn["value"], number, len(messages))
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        else:
            weight = {"weight": turn["weight"]} if "weight" in turn else {}
            message = {"role": role, "content": turn["value"], **weight, **_answers(role, messages)}
            messages.append(_read_message(message, f"turn {number}"))
    return messages


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Tool definitions, a list or its JSON text → OpenAI's {"type": "function", "function": …}. Raises `RowError`."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("a JSON list in 'tools'", describe(value)) from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("a list in 'tools'", describe(value))
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("a function with a name in 'tools'", describe(tool))
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in value]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"an object with role and content as {where}", describe(message))
    role = message.get("role")
    role = _ROLE_ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError(f"system, user, assistant or tool as the role of {where}", describe(role))
    # Columnar files fill absent keys with null.
    read = {key: value for key, value in message.items() if value is not None}
    read["role"] = role
    if legacy := read.pop("function_call", None):
        read["tool_calls"] = [{"type": "function", "function": legacy}]
    if calls := read.pop("tool_calls", None):
        if role != "assistant" or not isinstance(calls, list):
            raise RowError(f"tool calls as a list in an assistant message, {where}", describe(calls))
        read["tool_calls"] = [_read_call(call, where) for call in calls]
    read["content"] = _content(message.get("content"), where)
    if not (read["content"] or "").strip() and "tool_calls" not in read and role == "assistant":
        raise RowError(f"content in {where} (assistant)", describe(message.get("content")))
    if read["content"] is None and role != "assistant":
        raise RowError(f"content in {where} ({role})", "null" if "content" in message else "none")
    return read


def _content(value: Any, where: str) -> str | None:
    """Text, or the text of a list of parts. Images and audio have no place in a text model's template."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"text as content of {where}", describe(value))
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise RowError(f"text as content of {where}", f"a part of type {describe(kind)}")
        texts.append(text)
    return "".join(texts)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"a tool call with a name in {where}", describe(function))
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI sends arguments as JSON text; templates want the object (they write the JSON themselves).
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise RowError(f"JSON as tool call arguments in {where}", describe(arguments)) from error
    identity = {"id": call["id"]} if call.get("id") else {}
    return {"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}}


def _called(value: Any, number: int, index: int) -> list[dict[str, Any]]:
    """ShareGPT's function_call: JSON of one call or of several. Ids are as Mistral's template wants them: 9 letters."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"JSON with name and arguments in turn {number}", describe(value)) from error
    calls = calls if isinstance(calls, list) else [calls]
    read = [_read_call(call, f"turn {number}") for call in calls]
    return [{"id": f"call{index:03d}{place:02d}", **call} for place, call in enumerate(read)]


def _answers(role: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Which call a tool message answers: the next one of the last assistant message."""
    if role != "tool":
        return {}
    since = 0
    for message in reversed(messages):
        if message["role"] == "tool":
            since += 1
            continue
        calls = message.get("tool_calls", [])
        if since < len(calls):
            return {"tool_call_id": calls[since]["id"], "name": calls[since]["function"]["name"]}
        break
    return {}
