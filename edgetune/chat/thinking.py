"""Reasoning models: which marks stand around their reasoning, and what of it the template wants to see again.

Nothing is assumed of a model's name. The marks are found, in this order, by rendering a message that has reasoning in
a field of its own; as a pair of tags that the template or the vocabulary's control tokens spell; as single tokens of
the vocabulary. What is sent back is decided by rendering, too:

- the template writes a reasoning field: it gets the field, and decides by itself which turns show it;
- it takes the reasoning out of old answers by itself: it gets the whole text, as it was generated;
- neither: it gets the answer alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgetune.chat.marks import QUESTION, TAG, mark_before, render_after_question, shared_length
from edgetune.chat.tree import Node
from edgetune.engine.protocol import Tokenizer
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate

_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What templates call a message's reasoning."""
_WORD = re.compile(r"think|thought|reason|reflect|scratch|inner_", re.IGNORECASE)
_USUAL = ("<think>", "<thinking>", "<thought>", "<reasoning>", "<seed:think>", "[THINK]")
"""Looked up in vocabularies whose template says nothing."""
_REASONING, _ANSWER = "Weigh the Xylophone", "Take the Quagga"
_CALL = {"id": "call12345", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


@dataclass(frozen=True)
class Thinking:
    """How a model marks its reasoning."""

    start: str
    """What it opens it with."""
    end: str
    opened: bool = False
    """Whether the prompt has opened it already."""
    sent: Literal["field", "whole", "never"] = "never"
    """How the template gets it back."""
    field: str = ""
    """The message's field that holds it, where `sent` says so."""
    control_tokens: frozenset[str] = frozenset()
    """Texts of control tokens, when the marks are made of them: a reply's text does not spell those."""

    def split(self, text: str, *, running: bool = False) -> tuple[str, str]:
        """(reasoning, answer) of a reply's `text`, its control tokens spelled out; `running`: more of it may come."""
        begin = text.find(self.start)
        if begin >= 0 and not self._plain(text[:begin]).strip():
            begin += len(self.start)
        elif self.opened:
            begin = 0
        elif running and self.start.startswith(self._plain(text).strip()):
            return "", ""
        else:
            return "", self._plain(text)
        end = self.end
        if end not in text[begin:] and not running:
            # Something else than an answer may follow: a tool call.
            end = next(iter(TAG.findall(end)), end)
        reasoning, found, answer = text[begin:].partition(end)
        if running and not found:
            # What may become the closing mark is not shown before that is known.
            held = next((size for size in range(len(end) - 1, 0, -1) if reasoning.endswith(end[:size])), 0)
            reasoning = reasoning[: len(reasoning) - held]
        return self._plain(reasoning).strip(), self._plain(answer).lstrip()

    def spell(self, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """A reply's text with its control tokens, where the marks are made of them."""
        if not self.control_tokens:
            return text
        return tokenizer.decode(ids, special=True).decode(errors="replace")

    def read(self, node: Node, text: str, tokenizer: Tokenizer, *, running: bool = False) -> None:
        """Split a reply's `text` into content and reasoning of its `node`."""
        spelled = self.spell(text, node.ids, tokenizer)
        reasoning, node.content = self.split(spelled, running=running)
        if not reasoning and node.content == text:
            return
        node.meta["reasoning"], node.meta["raw"] = reasoning, text
        if spelled != text:
            node.meta["spelled"] = spelled

    def message(self, node: Node) -> dict[str, Any]:
        """The message of `node` as the template takes it, with its reasoning or without."""
        message = node.message
        if self.sent == "field":
            message[self.field] = node.meta["reasoning"]
        elif self.sent == "whole":
            message["content"] = (self.start + "\n" if self.opened else "") + node.generated
        return message

    def _plain(self, text: str) -> str:
        for token in self.control_tokens:
            text = text.replace(token, "")
        return text


def find_thinking(template: ChatTemplate, tokenizer: Tokenizer) -> Thinking | None:
    """How the model behind `template` and `tokenizer` marks its reasoning; None when nothing says that it reasons."""
    found = _by_field(template) or _by_tags(template, tokenizer)
    if found is None:
        return None
    start, end, field = found
    tags = {token for token in template.control_tokens if token in start + end}
    return Thinking(
        start,
        end,
        opened=_is_opened(template, start, end),
        sent="field" if field else "whole" if _strips(template, start, end) else "never",
        field=field,
        control_tokens=template.control_tokens if tags else frozenset(),
    )


def _by_field(template: ChatTemplate) -> tuple[str, str, str] | None:
    """(start, end, field) where the template writes a reasoning field, in any answer or before a tool call."""
    for message in ({"content": _ANSWER}, {"content": _ANSWER, "tool_calls": [_CALL]}):
        plain = render_after_question(template, {"role": "assistant", **message})
        for field in _FIELDS:
            text = render_after_question(template, {"role": "assistant", **message, field: _REASONING})
            before, found, rest = text.partition(_REASONING)
            tags = TAG.findall(before)
            # A template that writes empty tags around no reasoning shares the opening one, too.
            start = mark_before(before, plain) or (tags[-1] if tags else "")
            end = rest.partition(_ANSWER)[0].strip()
            if "tool_calls" in message or _ANSWER not in rest:
                # What follows is a call; its own marks are not the reasoning's.
                end = next(iter(TAG.findall(rest)), "")
            if found and start and end:
                return start, end, field
    return None


def _by_tags(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    spelled = {*TAG.findall(template.source), *template.control_tokens}
    for end in sorted(tag for tag in spelled if _WORD.search(tag)):
        if (start := _opening(end)) and (start in spelled or start in template.source or "/" in end):
            return start, end, ""
    for start in _USUAL:
        if all(len(tokenizer.encode(tag, add_special=False)) == 1 for tag in (start, _closing(start))):
            return start, _closing(start), ""
    return None


def _opening(end: str) -> str:
    """The tag that `end` closes; empty when it closes none."""
    for closing, opening in (("/", ""), ("END", "START"), ("end", "begin"), ("end", "start"), ("suffix", "prefix")):
        if closing in end:
            return end.replace(closing, opening, 1)
    return ""


def _closing(start: str) -> str:
    return f"{start[0]}/{start[1:]}"


def _is_opened(template: ChatTemplate, start: str, end: str) -> bool:
    asked = [{"role": "user", "content": _ANSWER}]
    try:
        without = template.render(asked).text
        prompt = template.render(asked, add_generation_prompt=True).text
    except UsageError:
        return False
    suffix = prompt[shared_length(without, prompt) :]
    return suffix.rfind(start) > suffix.rfind(end)


def _strips(template: ChatTemplate, start: str, end: str) -> bool:
    """Whether the template takes the reasoning out of an old answer that holds it."""
    whole = f"{start}\n{_REASONING}\n{end}\n\n{_ANSWER}"
    message = {"role": "assistant", "content": whole}
    text = render_after_question(template, message, QUESTION)
    return _ANSWER in text and _REASONING not in text
