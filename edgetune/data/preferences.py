"""Rows of preferences → a prompt with a better and a worse reply, or with one reply that was found good or bad.

Reads what public datasets, OpenAI's fine-tuning, LLaMA-Factory and `edgetune chat` itself (`/export pairs`) write:
prompts and replies as texts or messages, and whole conversations that differ at their end. Renders no template and
knows no vocabulary. A row that breaks its format raises `RowError` with what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from edgetune.data.columns import Columns
from edgetune.data.formats import Conversation, Pair, present_columns, read_text
from edgetune.data.messages import RowError, describe, read_messages, read_sharegpt, read_tools

Message = Mapping[str, Any]
Reply = str | tuple[Message, ...]
"""Bare text, or the messages that answer (one of the assistant's; more where tools were called in between)."""


@dataclass(frozen=True)
class Prompt:
    """What is replied to: bare text, or messages as a chat template takes them."""

    content: str | tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def answered(self, reply: Reply) -> Conversation | Pair:
        """The prompt with `reply`; nothing but the reply is learned."""
        if isinstance(self.content, str):
            assert isinstance(reply, str)
            return Pair(self.content, reply)
        assert not isinstance(reply, str)
        learned = [False] * len(self.content) + [message["role"] == "assistant" for message in reply]
        return Conversation((*self.content, *reply), self.tools, tuple(learned))

    @property
    def text(self) -> str:
        """The last thing said, for people."""
        return self.content if isinstance(self.content, str) else str(self.content[-1].get("content") or "")


def reply_text(reply: Reply) -> str:
    """What `reply` says, for people."""
    return reply if isinstance(reply, str) else "\n".join(str(message.get("content") or "") for message in reply)


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt."""

    prompt: Prompt
    chosen: Reply
    rejected: Reply

    @property
    def asked(self) -> Prompt:
        """What a row must not share with rows of other splits: the prompt, whatever the replies are."""
        return self.prompt

    def answered(self) -> Conversation | Pair:
        """The prompt with the better reply."""
        return self.prompt.answered(self.chosen)


@dataclass(frozen=True)
class Judged:
    """A reply and whether it is wanted."""

    prompt: Prompt
    reply: Reply
    good: bool

    @property
    def asked(self) -> Prompt:
        """As for `Preference`."""
        return self.prompt

    def answered(self) -> Conversation | Pair:
        """The prompt with its reply."""
        return self.prompt.answered(self.reply)


_PAIRS = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"))
_COMPLETIONS = ("completion", "response", "output", "answer")
_VERDICTS = ("label", "kto_tag")
_CONVERSATIONS = ("messages", "conversations", "conversation")
_WORDS = {"true": True, "false": False, "1": True, "0": False}


def paired_rows(*, chat: bool) -> Columns:
    """The format of rows with a better and a worse reply. `chat`: texts are put through the chat template too."""
    return Columns(
        "preference pairs",
        "prompt, chosen, rejected",
        lambda row: _pair_names(row) is not None,
        partial(_read_pair, chat=chat),
    )


def judged_rows(*, chat: bool) -> Columns:
    """The format of rows with one reply and a verdict on it."""
    return Columns(
        "judged replies",
        "prompt, completion, label: true or false",
        lambda row: _name(row, _VERDICTS) is not None and _has_reply(row),
        partial(_read_judged, chat=chat),
    )


def preference_task(values: Mapping[str, Any]) -> Literal["", "dpo", "kto"]:
    """The task that a row with these columns is plainly for; empty where it is none of preferences."""
    row = present_columns(values)
    if _pair_names(row) is not None:
        return "dpo"
    verdict = row.get(_name(row, _VERDICTS) or "")
    says = isinstance(verdict, bool) or (isinstance(verdict, str) and verdict.strip().lower() in ("true", "false"))
    return "kto" if says and _has_reply(row) else ""


def _name(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in values), None)


def _pair_names(values: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in _PAIRS if pair[0] in values and pair[1] in values), None)


def _has_reply(values: Mapping[str, Any]) -> bool:
    asked = _name(values, ("prompt", "instruction", "question"))
    return _name(values, _CONVERSATIONS) is not None or (asked is not None and _name(values, _COMPLETIONS) is not None)


# --- pairs


def _read_pair(values: Mapping[str, Any], *, chat: bool) -> Preference:
    better, worse = _pair_names(values) or ("", "")
    chosen, rejected = _read_reply(values, better), _read_reply(values, worse)
    if isinstance(chosen, str) != isinstance(rejected, str):
        chosen, rejected = _as_messages(chosen), _as_messages(rejected)
    prompt = _read_prompt(values, chat=chat)
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        if chosen == rejected:
            raise _same(better, worse)
        if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
            prompt, chosen, rejected = _split_conversations(chosen, rejected, prompt, values)
    if prompt is None:
        raise RowError("a prompt (prompt, messages, conversations, instruction or question)", "none")
    found = Preference(prompt, _fit(prompt, chosen, better), _fit(prompt, rejected, worse))
    if reply_text(found.chosen) == reply_text(found.rejected) and _calls(found.chosen) == _calls(found.rejected):
        raise _same(better, worse)
    return found


def _same(better: str, worse: str) -> RowError:
    return RowError(f"{better!r} and {worse!r} to differ", "the same reply in both")


def _calls(reply: Reply) -> list[Any]:
    return [] if isinstance(reply, str) else [message.get("tool_calls") for message in reply]


def _split_conversations(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...], prompt: Prompt | None, values: Mapping[str, Any]
) -> tuple[Prompt, tuple[Message, ...], tuple[Message, ...]]:
    """What two whole conversations begin with alike, and where they part. Raises `RowError` when prompts differ."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    ends = (chosen[at:], rejected[at:])
    if not at or any(not end or end[0]["role"] != "assistant" for end in ends):
        raise RowError("chosen and rejected as replies to the same prompt", "prompts that differ")
    common = chosen[:at]
    if prompt is not None and not _agrees(prompt, common):
        raise RowError("the prompt that chosen and rejected begin with", f"another one, {describe(prompt.text)}")
    system = () if prompt is None or isinstance(prompt.content, str) else prompt.content[:1]
    if system and system[0]["role"] == "system" and common[0]["role"] != "system":
        common = (*system, *common)
    return Prompt(common, tuple(read_tools(values.get("tools")))), *ends


def _agrees(prompt: Prompt, common: tuple[Message, ...]) -> bool:
    """Whether `prompt` asks what the conversation asks: all of it, or, as a text, its last message."""
    said = [str(message.get("content")).strip() for message in common if message["role"] != "system"]
    if isinstance(prompt.content, str):
        return prompt.content.strip() == said[-1]
    asked = [str(message.get("content")).strip() for message in prompt.content if message["role"] != "system"]
    return asked == said or asked == said[-1:]


# --- verdicts


def _read_judged(values: Mapping[str, Any], *, chat: bool) -> Judged:
    good = _verdict(values, _name(values, _VERDICTS) or "")
    completion = _name(values, _COMPLETIONS)
    if (name := _name(values, _CONVERSATIONS)) is not None and completion is None:
        messages = _read_turns(values[name])
        start = len(messages)
        while start and messages[start - 1]["role"] == "assistant":
            start -= 1
        if start == len(messages) or not start:
            raise RowError(f"a prompt and then an assistant message in {name!r}", "no such end")
        prompt, reply = _chat_prompt(_with_system(messages[:start], values), values, chat=chat), tuple(messages[start:])
        return Judged(prompt, reply, good)
    found = _read_prompt(values, chat=chat)
    assert found is not None
    assert completion is not None
    return Judged(found, _fit(found, _read_reply(values, completion), completion), good)


def _verdict(values: Mapping[str, Any], name: str) -> bool:
    value = values[name]
    if isinstance(value, bool):
        return value
    found = _WORDS.get(str(value).strip().lower()) if isinstance(value, int | str) else None
    if found is None:
        raise RowError(f"true or false in {name!r}", describe(value))
    return found


# --- prompts and replies


def _read_prompt(values: Mapping[str, Any], *, chat: bool) -> Prompt | None:
    """The prompt a row has in a column of its own; None where there is none."""
    if (name := _name(values, _CONVERSATIONS)) is not None:
        return _chat_prompt(_with_system(_read_turns(values[name]), values), values, chat=chat)
    asked = values.get("input")
    if isinstance(asked, Mapping) and "messages" in asked:  # OpenAI's preference rows
        return _chat_prompt(read_messages(asked["messages"]), {**values, **asked}, chat=chat)
    if "prompt" in values and (isinstance(values["prompt"], list | tuple) or _is_json_list(values["prompt"])):
        return _chat_prompt(_with_system(_read_turns(values["prompt"]), values), values, chat=chat)
    if (name := _name(values, ("prompt", "question", "instruction"))) is None:
        return None
    text = read_text(values, name)
    if name == "instruction" and (given := read_text(values, "input", empty=True)).strip():
        text = f"{text}\n\n{given}"
    if not chat:
        return Prompt(text)
    turns = _with_system([*_history(values), {"role": "user", "content": text}], values)
    return _chat_prompt(turns, values, chat=True)


def _chat_prompt(messages: list[dict[str, Any]], values: Mapping[str, Any], *, chat: bool) -> Prompt:
    if not chat:
        raise RowError("texts, as the model has no chat template (--chat-template gives one)", "messages")
    for message in messages:
        message.pop("weight", None)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError("a prompt that ends with a user or tool message", f"one that ends with {messages[-1]['role']}")
    return Prompt(tuple(messages), tuple(read_tools(values.get("tools"))))


def _history(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = values.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise RowError("a list of [user, assistant] pairs in 'history'", describe(turns))
    roles = ("user", "assistant")
    return [{"role": role, "content": str(text)} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _with_system(messages: list[dict[str, Any]], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = read_text(values, "system", empty=True)
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _read_reply(values: Mapping[str, Any], name: str) -> Reply:
    """Text, a message, or a list of messages, in OpenAI's or ShareGPT's spelling."""
    value = values[name]
    if isinstance(value, str) and not _is_json_list(value):
        return read_text(values, name)
    if not isinstance(value, str | Mapping | list | tuple):
        raise RowError(f"text or messages in {name!r}", describe(value))
    messages = _read_turns([value] if isinstance(value, Mapping) else value)
    for message in messages:
        message.pop("weight", None)
    return tuple(messages)


def _as_messages(reply: Reply) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": reply},) if isinstance(reply, str) else reply


def _is_json_list(value: Any) -> bool:
    """Whether `value` is a list of objects as CSV carries it: JSON in a cell."""
    return isinstance(value, str) and value.lstrip().startswith("[{") and value.rstrip().endswith("}]")


def _read_turns(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("a list of messages", describe(value)) from error
    is_sharegpt = isinstance(value, list | tuple) and value and isinstance(value[0], Mapping) and "from" in value[0]
    return read_sharegpt(value) if is_sharegpt else read_messages(value)


def _fit(prompt: Prompt, reply: Reply, name: str) -> Reply:
    """`reply` as `prompt` is: bare text, or messages that begin with the assistant's."""
    if isinstance(prompt.content, str):
        if not isinstance(reply, str):
            raise RowError(f"text in {name!r}, as the prompt is", "messages")
        return reply
    reply = _as_messages(reply)
    if reply[0]["role"] != "assistant" or any(message["role"] not in ("assistant", "tool") for message in reply):
        raise RowError(f"the assistant's reply in {name!r}", f"a {reply[0]['role']} message")
    return reply
