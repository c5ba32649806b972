"""Messages → the tokens that the engine continues, a reply's own tokens among them.

A model may split its words otherwise than the tokenizer does: a reply tokenized anew would no longer match the KV
cache, nor what the model saw. So wherever a reply's text stands in the prompt as it was said, its own tokens are taken.
The rendered text decides, so that a template that rewrites old turns is followed exactly. Keeps no history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.chat.marks import QUESTION, shared_length
from edgetune.chat.tree import Node
from edgetune.engine.protocol import Tokenizer
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Rendered, split_control

_LONGEST_CONTROL_TOKEN = 256
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
        self._openings: dict[tuple[str, bool], str] = {}

    def build(
        self,
        template: ChatTemplate,
        messages: Sequence[Mapping[str, Any]],
        *,
        replies: Sequence[Node],
        tools: Sequence[Mapping[str, Any]] = (),
        for_reply: bool = True,
    ) -> Prompt:
        """The prompt for `messages`; `replies` are those of them that have tokens of their own, in order.

        `for_reply` ends it where the next reply begins. Raises `UsageError` when the template refuses the messages.
        """
        rendered = template.render(messages, tools=tools or None, add_generation_prompt=for_reply)
        known = self._go_on_from(template, rendered, replies)
        ids, marks = list(known.ids), list(known.marks)
        done = {mark.node for mark in marks}
        opening = self._opening(template, tools)
        for node in replies:
            if node.id in done or node.meta.get("cut") or not opening:
                continue
            at = marks[-1].end if marks else 0
            start = _find_said(template, rendered, opening, _spelled(node), at)
            if start is not None:
                ids += [*self._tokenizer.encode_rendered(_part(rendered, at, start)), *node.ids]
                marks.append(_Mark(node.id, start, start + len(_spelled(node)), len(ids)))
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

    def _opening(self, template: ChatTemplate, tools: Sequence[Mapping[str, Any]]) -> str:
        """What the template writes right before a reply that is asked for."""
        key = (template.source, bool(tools))
        if key not in self._openings:
            self._openings[key] = _read_opening(template, tools)
        return self._openings[key]

    def _go_on_from(self, template: ChatTemplate, rendered: Rendered, replies: Sequence[Node]) -> Prompt:
        """The longest beginning of `rendered` that is known, up to the end of a reply; empty when none is."""
        here = {node.id for node in replies}
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


def _read_opening(template: ChatTemplate, tools: Sequence[Mapping[str, Any]]) -> str:
    try:
        plain = template.render([QUESTION], tools=tools or None).text
        asked = template.render([QUESTION], tools=tools or None, add_generation_prompt=True).text
    except UsageError:
        return ""
    # Where nothing opens a reply, it follows what closes the question.
    return asked[shared_length(plain, asked) :] or asked.rpartition(QUESTION["content"])[2]


def _find_said(template: ChatTemplate, rendered: Rendered, opening: str, said: str, at: int) -> int | None:
    """Where, from `at` on, `said` stands as a whole reply after `opening`; None when it does not."""
    while (found := rendered.text.find(opening + said, at)) >= 0:
        start = found + len(opening)
        # What a message spells is no opening.
        is_ours = not any(found < cut < start for cut in rendered.cuts)
        if is_ours and _breaks(template, rendered, start + len(said)):
            return start
        at = found + 1
    return None


def _agree(known: Rendered, rendered: Rendered, mark: _Mark) -> bool:
    # The same characters are other tokens where they are a message's own, so the cuts before the reply count too.
    if rendered.text[: mark.end] != known.text[: mark.end]:
        return False
    return _cuts_before(known, mark.start) == _cuts_before(rendered, mark.start)


def _cuts_before(rendered: Rendered, end: int) -> tuple[int, ...]:
    return tuple(cut for cut in rendered.cuts if cut < end)


def _breaks(template: ChatTemplate, rendered: Rendered, position: int) -> bool:
    """Whether nothing merges across `position`: a control token, or nothing at all, comes next."""
    rest = _part(rendered, position, position + _LONGEST_CONTROL_TOKEN)
    return not rest.text or split_control(rest, template.control_tokens)[0][1]


def _part(rendered: Rendered, start: int, end: int) -> Rendered:
    return Rendered(rendered.text[start:end], tuple(cut - start for cut in rendered.cuts if start <= cut < end))
