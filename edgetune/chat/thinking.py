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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol, cast

from edgetune.chat.tree import Node
from edgetune.engine.protocol import Tokenizer
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Message

_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What templates call a message's reasoning."""
_TAG = re.compile(r"<\|?/?[A-Za-z_:]+\|?>|\[/?[A-Z_]+\]")
_WORD = re.compile(r"think|thought|reason|reflect|scratch", re.IGNORECASE)
_USUAL = ("<think>", "<thinking>", "<thought>", "<reasoning>", "<seed:think>", "[THINK]")
"""Looked up in vocabularies whose template says nothing."""
_REASONING, _ANSWER = "Weigh the Xylophone", "Take the Quagga"


class _Speller(Protocol):
    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes: ...


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

    def split(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) of a reply's `text`, finished or not, its control tokens spelled out."""
        begin = text.find(self.start)
        if begin >= 0 and not self._plain(text[:begin]).strip():
            begin += len(self.start)
        elif self.opened:
            begin = 0
        elif text.strip() and self.start.startswith(text.strip()):
            return "", ""
        else:
            return "", self._plain(text)
        stop = text.find(self.end, begin)
        if stop < 0:
            return self._plain(text[begin:]).strip(), ""
        return self._plain(text[begin:stop]).strip(), self._plain(text[stop + len(self.end) :]).lstrip()

    def spell(self, text: str, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """A reply's text with its control tokens, where the marks are made of them."""
        if not self.control_tokens:
            return text
        return cast(_Speller, tokenizer).decode(ids, special=True).decode(errors="replace")

    def read(self, node: Node, text: str, tokenizer: Tokenizer) -> None:
        """Split a reply's `text` into content and reasoning of its `node`."""
        spelled = self.spell(text, node.ids, tokenizer)
        reasoning, node.content = self.split(spelled)
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
    """(start, end, field) where the template writes a reasoning field."""
    plain = _render(template, {"role": "assistant", "content": _ANSWER})
    for field in _FIELDS:
        text = _render(template, {"role": "assistant", "content": _ANSWER, field: _REASONING})
        if _REASONING not in text or _ANSWER not in text.split(_REASONING)[-1]:
            continue
        before, _, rest = text.partition(_REASONING)
        # A template that writes empty tags around no reasoning shares the opening one, too.
        own = before[_shared(before, plain) :].strip()
        tags = _TAG.findall(before)
        start, end = own or (tags[-1] if tags else ""), rest.partition(_ANSWER)[0].strip()
        if start and end:
            return start, end, field
    return None


def _by_tags(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, str, str] | None:
    spelled = {*_TAG.findall(template.source), *template.control_tokens}
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
    suffix = prompt[_shared(without, prompt) :]
    return suffix.rfind(start) > suffix.rfind(end)


def _strips(template: ChatTemplate, start: str, end: str) -> bool:
    """Whether the template takes the reasoning out of an old answer that holds it."""
    whole = f"{start}\n{_REASONING}\n{end}\n\n{_ANSWER}"
    text = _render(template, {"role": "assistant", "content": whole}, {"role": "user", "content": "And then?"})
    return _ANSWER in text and _REASONING not in text


def _render(template: ChatTemplate, *messages: Message) -> str:
    """The text of `messages` after a question; empty when the template refuses them."""
    try:
        return template.render([{"role": "user", "content": "What now?"}, *messages]).text
    except UsageError:
        return ""


def _shared(left: str, right: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
