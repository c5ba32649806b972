"""Chat templates: messages → the exact text a model was trained on, with user text kept apart from control tokens.

The one renderer that training, proof and chat share. It reproduces the Jinja environment of transformers'
`apply_chat_template` (trim_blocks, lstrip_blocks, loop controls, `{% generation %}`, `tojson`, `raise_exception`,
`strftime_now`) without importing transformers. It knows no vocabulary: turning the rendered text into token ids is the
tokenizer's work, which must honour `Rendered.cuts` (see `split_control`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgetune.errors import UsageError

Message = Mapping[str, Any]
"""One turn: "role", "content" (text or a list of parts), and what the template takes besides, e.g. "tool_calls"."""

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Rendered:
    """What a template made of a conversation."""

    text: str
    """Exactly the template's output."""
    cuts: tuple[int, ...] = ()
    """Positions in `text` that no control token may span: there, a message's own characters spell (part of) one."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's Jinja chat template with the special tokens it refers to."""

    source: str
    """The Jinja source, as in `tokenizer_config.json`, `chat_template.jinja` or `tokenizer.chat_template`."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Names the template may use: "bos_token", "eos_token", "pad_token", …"""
    control_tokens: frozenset[str] = frozenset()
    """Texts of the vocabulary's control tokens; never made from what a message says."""
    now: datetime | None = None
    """What a template that writes the date takes for today; None: today."""
    tool_source: str = ""
    """Takes the place of `source` where there are tools (transformers' named template "tool_use"); empty: none does."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """Render `messages` as transformers' `apply_chat_template(tokenize=False)` does.

        Raises `UsageError` when the template refuses the conversation (its own `raise_exception`) or is not valid.
        """
        source = self.in_force(tools).source
        mark = unused_character(json.dumps([list(messages), tools], ensure_ascii=False, default=str), source)
        shield = _Shield(self.control_tokens, mark)
        try:
            marked = _compile(source).render(
                messages=[shield.message(message) for message in messages],
                tools=shield.value(list(tools)) if tools else None,
                add_generation_prompt=add_generation_prompt,
                documents=None,
                strftime_now=(self.now or datetime.now()).strftime,
                **self.special_tokens,
                **variables,
            )
        except (TemplateError, SecurityError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UsageError(
                f"The model's chat template refuses this conversation: {error}.",
                hint="Check the roles: some templates take no system message, or want user and assistant in turn.",
            ) from error
        return _unmark(marked, mark)

    def in_force(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """The template that messages with these `tools` are rendered by."""
        return replace(self, source=self.tool_source, tool_source="") if tools and self.tool_source else self

    def shielded(self, text: str) -> Rendered:
        """`text` as if a message said it and a template wrote it: no control token can be made of it."""
        mark = unused_character(text)
        return _unmark(_Shield(self.control_tokens, mark).text(text), mark)


def split_control(rendered: Rendered, control_tokens: Iterable[str]) -> list[tuple[str, bool]]:
    """Split into (text, is_control) pieces: leftmost-longest matches of `control_tokens` that no cut divides."""
    tokens = frozenset(control_tokens)
    pattern = _control_pattern(tokens)
    if pattern is None:
        return [(rendered.text, False)] if rendered.text else []
    pieces: list[tuple[str, bool]] = []
    start = position = 0
    while match := pattern.search(rendered.text, position):
        begin = match.start()
        end = _whole_end(rendered, begin, match.end(), tokens)
        if end == begin:
            position = begin + 1
            continue
        if begin > start:
            pieces.append((rendered.text[start:begin], False))
        pieces.append((rendered.text[begin:end], True))
        start = position = end
    if start < len(rendered.text):
        pieces.append((rendered.text[start:], False))
    return pieces


def _whole_end(rendered: Rendered, begin: int, longest_end: int, tokens: frozenset[str]) -> int:
    """Where the longest control token that begins at `begin` and that no cut divides ends; `begin` when none does."""
    if not rendered.cuts:
        return longest_end
    cut = min((cut for cut in rendered.cuts if begin < cut < longest_end), default=longest_end)
    return next((end for end in range(cut, begin, -1) if rendered.text[begin:end] in tokens), begin)


class _Shield:
    """Puts `mark` inside every control token a message spells, and where one could grow across a message's edge."""

    def __init__(self, control_tokens: frozenset[str], mark: str) -> None:
        self.mark = mark
        self.pattern = _control_pattern(control_tokens)
        self.heads, self.tails = _edges(control_tokens)

    def message(self, message: Message) -> dict[str, Any]:
        return {key: value if key == "role" else self.value(value) for key, value in message.items()}

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.key(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def key(self, key: Any) -> Any:
        """A name that a template looks up stays as it is; any other key is what a message says."""
        return self.text(key) if isinstance(key, str) and not key.isidentifier() else key

    def text(self, text: str) -> str:
        if self.pattern is None or not text:
            return text
        # A mark at an edge stands inside the white space there, which a template may trim away to join two texts.
        inner = text.strip()
        lead = text[: len(text) - len(text.lstrip())]
        opens = inner.endswith(self.heads.get(inner[-1:], ()))
        closes = inner.startswith(self.tails.get(inner[:1], ()))
        broken, position = [], 0
        while match := self.pattern.search(inner, position):
            broken.append(inner[position : match.start() + 1] + self.mark)
            position = match.start() + 1
        broken.append(inner[position:])
        shielded = (self.mark if closes else "") + "".join(broken) + (self.mark if opens else "")
        return lead + shielded + text[len(lead) + len(inner) :]


def _unmark(marked: str, mark: str) -> Rendered:
    # A template that writes ASCII alone (`tojson(ensure_ascii=true)`) wrote the mark as an escape.
    parts = marked.replace(_escaped(mark), mark).split(mark)
    cuts, position = [], 0
    for part in parts[:-1]:
        position += len(part)
        cuts.append(position)
    return Rendered("".join(parts), tuple(cuts))


def unused_character(*texts: str) -> str:
    """A private-use character that none of `texts` contains, nor its escape in JSON."""
    unused = (
        character
        for character in map(chr, _PRIVATE_USE)
        if not any(character in text or _escaped(character) in text for text in texts)
    )
    return next(unused)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


@lru_cache(maxsize=8)
def _control_pattern(control_tokens: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(filter(None, control_tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


_ByCharacter = Mapping[str, tuple[str, ...]]


@lru_cache(maxsize=8)
def _edges(control_tokens: frozenset[str]) -> tuple[_ByCharacter, _ByCharacter]:
    """What a control token can begin with, by its last character, and end with, by its first."""
    heads, tails = dict[str, tuple[str, ...]](), dict[str, tuple[str, ...]]()
    cuts = [(token[:at], token[at:]) for token in control_tokens for at in range(1, len(token))]
    for head in {head for head, _ in cuts}:
        heads[head[-1]] = (*heads.get(head[-1], ()), head)
    for tail in {tail for _, tail in cuts}:
        tails[tail[0]] = (*tails.get(tail[0], ()), tail)
    return heads, tails


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


class _GenerationBlock(Extension):
    """Accepts `{% generation %}…{% endgeneration %}`, which marks what an assistant said, and renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
