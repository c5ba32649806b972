"""Raw rows → examples: recognises what a dataset's columns mean and checks every row against it.

Chat messages (OpenAI), ShareGPT, Alpaca, prompt/completion, question/answer and plain text. Renders no template and
knows no vocabulary. A row that breaks its format raises `RowError` with what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgetune.data.messages import RowError, describe, read_messages, read_sharegpt, read_tools

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
"""How an instruction is put to a model without a chat template (Stanford Alpaca's own wording)."""

ALPACA_INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, ending with the last assistant message."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    learned: tuple[bool, ...] = ()
    """Per message: whether it is one to learn (assistant messages, unless the row gives them weight 0)."""


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it, without any template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Document:
    """Text to continue, all of it learned."""

    text: str


Example = Conversation | Pair | Document
Task = Literal["chat", "completion"]
"""How a row is put to the model: through its chat template, or as bare text."""


@dataclass(frozen=True)
class Format:
    """One known layout of rows."""

    name: str
    columns: str
    """The columns a row has, for people."""
    matches: Callable[[Mapping[str, Any]], bool]
    read_chat: Callable[[Mapping[str, Any]], Conversation] | None = None
    """Row → conversation; None where the format is not about turns."""
    read_completion: Callable[[Mapping[str, Any]], Pair | Document] | None = None
    """Row → bare text; None where the format needs a template."""

    def read(self, values: Mapping[str, Any], task: Task) -> Example:
        """The example that `values` describe. Raises `RowError`."""
        present = present_columns(values)
        if not self.matches(present):
            found = ", ".join(f"{key} (null)" if value is None else str(key) for key, value in values.items())
            raise RowError(f"{self.name} ({self.columns})", f"the columns {found or 'none'}")
        read = self.read_chat if task == "chat" else self.read_completion
        assert read is not None
        return read(present)


def detect_format(values: Mapping[str, Any]) -> Format | None:
    """The format that a row with these columns is in; None when it is no known one."""
    present = present_columns(values)
    if "chosen" in present and "rejected" in present:
        return None
    return next((known for known in FORMATS if known.matches(present)), None)


def present_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that hold something, by their names in lower case (spreadsheets say "Prompt")."""
    lower = {str(key).strip().lower(): value for key, value in values.items() if value is not None}
    return lower if len(lower) == sum(value is not None for value in values.values()) else dict(values)


def _any_of(values: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if name in values), None)


def read_text(values: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """The text in column `name`. Raises `RowError` when it is no text or, unless `empty` is allowed, says nothing."""
    value = values.get(name, "")
    if not isinstance(value, str):
        raise RowError(f"text in {name!r}", describe(value))
    if not value.strip() and not empty:
        raise RowError(f"text in {name!r}", "nothing" if not value else "only white space")
    return value


def _conversation(messages: list[dict[str, Any]], values: Mapping[str, Any]) -> Conversation:
    learned = [message.pop("weight", 1) != 0 and message["role"] == "assistant" for message in messages]
    if not any(learned):
        raise RowError("at least one assistant message to learn", "none")
    last = max(index for index, is_learned in enumerate(learned) if is_learned) + 1
    return Conversation(tuple(messages[:last]), tuple(read_tools(values.get("tools"))), tuple(learned[:last]))


def _chat(values: Mapping[str, Any]) -> Conversation:
    return _conversation(read_messages(_json_cell(values["messages"])), values)


def _sharegpt(values: Mapping[str, Any]) -> Conversation:
    name = _any_of(values, "conversations", "conversation") or ""
    turns = _json_cell(values[name])
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]:
        messages = read_messages(turns)
    else:
        messages = read_sharegpt(turns)
    if "system" in values and (system := read_text(values, "system", empty=True)):
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(messages, values)


def _json_cell(value: Any) -> Any:
    """A list as it is, or as CSV carries it: JSON in a cell."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError("a list of messages", describe(value)) from error


def _alpaca_chat(values: Mapping[str, Any]) -> Conversation:
    output = _any_of(values, "output", "response") or ""
    instruction, given = read_text(values, "instruction"), read_text(values, "input", empty=True)
    messages = [{"role": "user", "content": f"{instruction}\n\n{given}" if given.strip() else instruction}]
    for turn in reversed(_history(values.get("history"))):
        messages[:0] = [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    if system := read_text(values, "system", empty=True):
        messages.insert(0, {"role": "system", "content": system})
    return _conversation([*messages, {"role": "assistant", "content": read_text(values, output)}], values)


def _history(value: Any) -> list[tuple[str, str]]:
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in value):
        raise RowError("a list of [user, assistant] pairs in 'history'", describe(value))
    return [(str(turn[0]), str(turn[1])) for turn in value]


def _alpaca_completion(values: Mapping[str, Any]) -> Pair:
    output = _any_of(values, "output", "response") or ""
    instruction, given = read_text(values, "instruction"), read_text(values, "input", empty=True)
    wording = ALPACA_INPUT_PROMPT if given.strip() else ALPACA_PROMPT
    return Pair(wording.format(instruction=instruction, input=given), read_text(values, output))


def _pair_columns(values: Mapping[str, Any]) -> tuple[str, str] | None:
    prompt = _any_of(values, "prompt")
    completion = _any_of(values, "completion", "response", "output", "answer")
    return (prompt, completion) if prompt and completion else None


def _pair_chat(values: Mapping[str, Any]) -> Conversation:
    prompt, completion = _pair_columns(values) or ("", "")
    if isinstance(values[prompt], list):
        completed = values[completion]
        turns = completed if isinstance(completed, list) else [{"role": "assistant", "content": completed}]
        messages = read_messages([*values[prompt], *turns])
        asked = len(values[prompt])
        return _conversation([{**m, "weight": 1 if i >= asked else 0} for i, m in enumerate(messages)], values)
    return _ask(read_text(values, prompt), read_text(values, completion), values)


def _ask(question: str, answer: str, values: Mapping[str, Any]) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system := read_text(values, "system", empty=True):
        messages.insert(0, {"role": "system", "content": system})
    return _conversation(messages, values)


def _pair_completion(values: Mapping[str, Any]) -> Pair:
    prompt, completion = _pair_columns(values) or ("", "")
    return Pair(read_text(values, prompt, empty=True), read_text(values, completion))


def _question_chat(values: Mapping[str, Any]) -> Conversation:
    return _ask(read_text(values, "question"), read_text(values, "answer"), values)


def _question_completion(values: Mapping[str, Any]) -> Pair:
    return Pair(f"Question: {read_text(values, 'question')}\nAnswer:", f" {read_text(values, 'answer')}")


def _document(values: Mapping[str, Any]) -> Document:
    return Document(read_text(values, "text"))


FORMATS = (
    Format("chat messages", "messages: role, content", lambda row: "messages" in row, _chat),
    Format(
        "ShareGPT",
        "conversations: from, value",
        lambda row: "conversations" in row or "conversation" in row,
        _sharegpt,
    ),
    Format(
        "Alpaca",
        "instruction, [input], output",
        lambda row: "instruction" in row and ("output" in row or "response" in row),
        _alpaca_chat,
        _alpaca_completion,
    ),
    Format(
        "prompt/completion",
        "prompt, completion",
        lambda row: _pair_columns(row) is not None,
        _pair_chat,
        _pair_completion,
    ),
    Format(
        "question/answer",
        "question, answer",
        lambda row: "question" in row and "answer" in row,
        _question_chat,
        _question_completion,
    ),
    Format("plain text", "text", lambda row: "text" in row, None, _document),
)
"""Every known format; the first that matches a row is taken."""
