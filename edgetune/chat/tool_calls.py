"""Whether a reply calls a tool: told by what the template itself writes before a call. No call is ever made."""

from __future__ import annotations

import re
from functools import lru_cache

from edgetune.chat.marks import mark_before, render_after_question
from edgetune.template import ChatTemplate

_NAME, _ANSWER = "quaggafinder", "Xylophones."
_OFFERED = {"type": "function", "function": {"name": "zebra", "description": "", "parameters": {"properties": {}}}}
"""What a template that is only taken with tools is given."""
_ENOUGH = 4
"""Shorter marks are found in any text."""


def calls_tool(template: ChatTemplate, text: str, *, offered: bool) -> bool:
    """Whether `text`, a reply under `template`, holds a tool call; `offered`: whether the model was told of tools."""
    special = tuple(template.special_tokens.items())
    mark = _call_mark(template.source, special, template.control_tokens, offered=offered)
    # Where a call is bare JSON, an answer may be the same.
    return bool(mark) and (offered or mark.startswith("<")) and mark in _squeezed(text)


@lru_cache(maxsize=8)
def _call_mark(
    source: str, special: tuple[tuple[str, str], ...], control_tokens: frozenset[str], *, offered: bool
) -> str:
    """What stands before a called function's name, as a reply's text shows it; empty when there are no calls."""
    template = ChatTemplate(source, dict(special), control_tokens)
    tools = [_OFFERED] if offered else None
    plain = render_after_question(template, {"role": "assistant", "content": _ANSWER}, tools=tools)
    # Templates want the arguments as an object or as its JSON, and content that is missing or empty.
    forms: tuple[object, ...] = ({}, "{}")
    for arguments in forms:
        for content in ("", None):
            call = {"id": "call12345", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
            message = {"role": "assistant", "content": content, "tool_calls": [call]}
            before, found, _ = render_after_question(template, message, tools=tools).partition(_NAME)
            # A reply's text shows no control tokens, so only what follows the last one can be found in it.
            pattern = "|".join(map(re.escape, control_tokens)) or "(?!)"
            mark = _squeezed(re.split(pattern, mark_before(before, plain))[-1])
            if found and len(mark) >= _ENOUGH:
                return mark
    return ""


def _squeezed(text: str) -> str:
    """Without white space, which models write as they like."""
    return "".join(text.split())
