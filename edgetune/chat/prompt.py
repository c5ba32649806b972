"""Messages → the tokens that the engine continues, a reply's own tokens among them.

A model may split its words otherwise than the tokenizer does: a reply tokenized anew would no longer match the KV
cache, nor what the model saw. So wherever a reply's text stands in the prompt as it was said, its own tokens are taken.
The rendered text decides, so that a template that rewrites old turns is followed exactly. Keeps no history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.chat.tree import Node
from edgetune.engine.protocol import Tokenizer
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Rendered, split_control

_REMEMBERED = 8
"""How many prompts are kept to go on from; more than undo, retry and a look at another branch go back in practice."""


@dataclass(frozen=True)
class _Mark:
    """Where a reply's own tokens stand in a prompt."""

    node: str
    start: int
    """In the text."""
    end: int
    ids_end: int


@dataclass(frozen=True)
class Prompt:
    """What the engine is asked to continue."""

    rendered: Rendered
    ids: list[int]
    marks: tuple[_Mark, ...] = ()

    @property
    def text(self) -> str:
        """The template's output."""
        return self.rendered.text


class PromptBuilder:
    """Builds prompts, and remembers the last ones so that only what is new is rendered piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """`tokenizer` is the engine's."""
        self._tokenizer = tokenizer
        self._known: list[Prompt] = []

    def build(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        replies: Mapping[int, Node],
        tools: Sequence[Mapping[str, Any]] = (),
        for_reply: bool = True,
    ) -> Prompt:
        """The prompt for `messages`; `replies` are the generated ones by their index, with their own tokens.

        `for_reply` ends it where the next reply begins. Raises `UsageError` when the template refuses the messages.
        """
        rendered = template.render(messages, tools=tools or None, add_generation_prompt=for_reply)
        start = self._go_on_from(template, rendered, replies)
        ids, marks = list(start.ids), list(start.marks)
        done = {mark.node for mark in marks}
        for index, node in replies.items():
            if node.id in done or node.meta.get("cut"):
                continue
            try:
                before = template.render(messages[:index], tools=tools or None, add_generation_prompt=True).text
            except UsageError:
                continue
            said, at = _spelled(node), marks[-1].end if marks else 0
            end = len(before) + len(said)
            if at <= len(before) and rendered.text.startswith(before + said) and _breaks(template, rendered, end):
                ids += [*self._tokenizer.encode_rendered(_part(rendered, at, len(before))), *node.ids]
                marks.append(_Mark(node.id, len(before), end, len(ids)))
        ids += self._tokenizer.encode_rendered(_part(rendered, marks[-1].end if marks else 0, len(rendered.text)))
        return Prompt(rendered, ids, tuple(marks))

    def remember(self, prompt: Prompt, reply: Node) -> None:
        """Go on from `prompt` and the `reply` to it, where a later prompt begins with them."""
        if reply.meta.get("cut"):
            return
        said = _spelled(reply)
        ids = [*prompt.ids, *reply.ids]
        start = len(prompt.text)
        mark = _Mark(reply.id, start, start + len(said), len(ids))
        known = Prompt(Rendered(prompt.text + said, prompt.rendered.cuts), ids, (*prompt.marks, mark))
        self._known = [*self._known[-_REMEMBERED:], known]

    def _go_on_from(self, template: ChatTemplate, rendered: Rendered, replies: Mapping[int, Node]) -> Prompt:
        """The longest beginning of `rendered` that is known, up to the end of a reply; empty when none is."""
        here = {node.id for node in replies.values()}
        best = Prompt(Rendered(""), [])
        for known in reversed(self._known):
            for mark in reversed(known.marks):
                if mark.end <= len(best.text):
                    break
                if (
                    mark.node in here
                    and _agree(known.rendered, rendered, mark)
                    and _breaks(template, rendered, mark.end)
                ):
                    marks = tuple(one for one in known.marks if one.end <= mark.end)
                    best = Prompt(Rendered(rendered.text[: mark.end]), known.ids[: mark.ids_end], marks)
                    break
        return best


def _spelled(node: Node) -> str:
    """A reply's text as a template spells it, its control tokens written out."""
    return str(node.meta.get("spelled", node.generated))


def _agree(known: Rendered, rendered: Rendered, mark: _Mark) -> bool:
    # The same characters are other tokens where they are a message's own, so the cuts before the reply count too.
    if rendered.text[: mark.end] != known.text[: mark.end]:
        return False
    return _cuts_before(known, mark.start) == _cuts_before(rendered, mark.start)


def _cuts_before(rendered: Rendered, end: int) -> tuple[int, ...]:
    return tuple(cut for cut in rendered.cuts if cut < end)


def _breaks(template: ChatTemplate, rendered: Rendered, position: int) -> bool:
    """Whether nothing merges across `position`: a control token, or nothing at all, comes next."""
    rest = _part(rendered, position, len(rendered.text))
    return not rest.text or split_control(rest, template.control_tokens)[0][1]


def _part(rendered: Rendered, start: int, end: int) -> Rendered:
    return Rendered(rendered.text[start:end], tuple(cut - start for cut in rendered.cuts if start <= cut < end))
