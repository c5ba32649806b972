"""Conversations → token ids and which of them are learned: what the assistant says, exactly, for any chat template.

Most templates do not mark replies, so they are found by rendering. A reply starts where the template's generation
prompt for it ends, and ends with the first end-of-turn token the template itself writes after it (both found in
rendered text, where characters of a message never count as control tokens). The prompt's ids are encoded apart from the
reply's, so training sees exactly the ids that chat will make of the same prompt.

A conversation becomes one sequence when each turn's rendering is a prefix of the next one's. Templates that rewrite
earlier turns (Qwen3 drops their thinking, Mistral moves the tools) give one sequence for each stretch of turns that
agree, so that every reply is learned behind the very prompt it will be asked with. Where that prompt opens a thought
that finished replies are written without (DeepSeek-R1), the row's own thought is put there, an empty one without one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.formats import Conversation, Document, Pair
from edgetune.data.messages import RowError
from edgetune.data.tokenizer import Text, TextTokenizer
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Message, Rendered, split_control, unused_character

_MARK = "\uf8ff"
"""A private-use character that no template contains."""

_WORDS = re.compile(r"\w+")

_OPENED_THOUGHT = re.compile(r"<((?:\w+:)?(?:think|thinking|thought|reasoning))>\s*$", re.IGNORECASE)
"""The end of a generation prompt after which the model writes a thought and closes it itself."""

_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where a message keeps its thought, if not in its content."""


@dataclass(frozen=True)
class Tokenized:
    """A training sequence: token ids and, for each, whether the model learns to produce it."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]

    @property
    def learned_count(self) -> int:
        """How many tokens are learned."""
        return int(self.learned.sum())

    def cut(self, length: int) -> Tokenized:
        """The first `length` tokens."""
        return self if len(self.ids) <= length else Tokenized(self.ids[:length], self.learned[:length])


_Rendering = tuple[Rendered, list[tuple[int, int]]]
"""A conversation as far as its last reply, and where the replies in it are."""


@dataclass(frozen=True)
class Draft:
    """An example before its texts are encoded, which is done for many at a time."""

    renderings: Sequence[_Rendering] = ()
    """Of a conversation."""
    texts: Sequence[Text] = ()
    """Of a pair, its prompt and its completion; or a document."""
    windowed: bool = False
    """Whether it is a document."""


@dataclass
class Masker:
    """Turns examples into sequences with one tokenizer and, for conversations, its chat template."""

    tokenizer: TextTokenizer
    max_length: int
    """Window for documents, in tokens; other sequences are cut later, by the dataset."""
    notes: dict[str, None] = field(default_factory=dict)
    """What was noticed about the template, each once, in order."""

    def sequences(self, example: Conversation | Pair | Document) -> list[Tokenized]:
        """The training sequences of one example. Raises `RowError` when the template cannot render it."""
        return self.encode([self.draft(example)])[0]

    def draft(self, example: Conversation | Pair | Document) -> Draft:
        """What is to be encoded for one example. Raises `RowError` when the template cannot render it."""
        if isinstance(example, Conversation):
            return Draft(renderings=self._conversation(example))
        if isinstance(example, Document):
            return Draft(texts=(Text(example.text, first=True),), windowed=True)
        return Draft(texts=(Text(example.prompt, first=True), Text(example.completion, True, bool(example.prompt))))

    def encode(self, drafts: Sequence[Draft]) -> list[list[Tokenized]]:
        """The training sequences of each of `drafts`, in their order."""
        renderings = [found for draft in drafts for found in draft.renderings]
        splits = [_splits(*found) for found in renderings]
        items = [(rendered, at) for (rendered, _), at in zip(renderings, splits, strict=True)]
        parts = iter(zip(renderings, splits, self.tokenizer.encode_all_parts(items), strict=True))
        texts = iter(self.tokenizer.encode_texts([text for draft in drafts for text in draft.texts]))

        def finish(draft: Draft) -> list[Tokenized]:
            if draft.windowed:
                return self._windows(next(texts))
            if draft.texts:
                prompt = [*self.tokenizer.prefix_ids, *next(texts)]
                return [_sequence([(prompt, False), ([*next(texts), *self._eos()], True)])]
            return [self._conversed(*next(parts)) for _ in draft.renderings]

        return [finish(draft) for draft in drafts]

    def _windows(self, ids: list[int]) -> list[Tokenized]:
        prefix, ids = list(self.tokenizer.prefix_ids), [*ids, *self._eos()]
        window = max(1, self.max_length - len(prefix))
        return [_sequence([(prefix, False), (ids[at : at + window], True)]) for at in range(0, len(ids), window)]

    def _conversed(self, rendering: _Rendering, splits: Sequence[int], parts: Sequence[list[int]]) -> Tokenized:
        starts = {start for start, _ in rendering[1]}
        return _sequence([(ids, begin in starts) for ids, begin in zip(parts, [0, *splits], strict=True)])

    def _eos(self) -> list[int]:
        return [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]

    def _conversation(self, conversation: Conversation) -> list[_Rendering]:
        template = self.tokenizer.chat_template
        assert template is not None
        renderer = _Renderer(template, conversation)
        sequences: list[_Rendering] = []
        for turn in reversed([i for i, learned in enumerate(conversation.learned) if learned]):
            rendered, region = self._reply(renderer, turn)
            if sequences and _continues(sequences[-1][0], rendered, region[1]):
                sequences[-1][1].insert(0, region)
            else:
                sequences.append((rendered, [region]))
        return sequences[::-1]

    def _reply(self, renderer: _Renderer, turn: int) -> tuple[Rendered, tuple[int, int]]:
        """The rendering that ends with message `turn`, and where its reply starts and ends in it."""
        message, finished = renderer.messages[turn], renderer.render(turn + 1)
        rendered, start = self._start(renderer, finished, turn)
        end = self._end(rendered, start)
        if end is None:
            rendered = self._with_end(renderer, rendered, turn)
            end = len(rendered.text)
        _check_reply(rendered.text[start:end], message, turn)
        self._note_left_out(renderer.conversation, rendered.text[:start], rendered.text[start:end], turn)
        return Rendered(rendered.text[:end], tuple(c for c in rendered.cuts if c < end)), (start, end)

    def _with_end(self, renderer: _Renderer, rendered: Rendered, turn: int) -> Rendered:
        """`rendered` cut after message `turn`'s content, with the model's own end token for it to learn to stop."""
        if renderer.messages[turn].get("tool_calls"):
            raise RowError(
                "a chat template that ends tool calls with a control token, such as {{ eos_token }}",
                f"none after message {turn + 1}",
            )
        eos = next((text for text, index in self.tokenizer.control_ids.items() if index == self.tokenizer.eos_id), "")
        if eos:
            self._note("The chat template ends no reply with a control token; the model's end-of-text token is added.")
        else:
            self._note("Neither the chat template nor the tokenizer has a token that ends a reply: none is learned.")
        content_end = len(rendered.text) - len(renderer.after(turn))
        return Rendered(rendered.text[:content_end] + eos, tuple(c for c in rendered.cuts if c <= content_end))

    def _start(self, renderer: _Renderer, finished: Rendered, turn: int) -> tuple[Rendered, int]:
        """The text that ends with message `turn`, and where its reply starts in it."""
        prompt, history = renderer.prompt(turn), renderer.history(turn)
        if prompt is not None and finished.text.startswith(prompt.text):
            start = len(prompt.text)
            if prompt.text == history and not finished.text[start:].lstrip().startswith(renderer.opening(turn)):
                self._note(
                    "The chat template writes a reply's header but has no generation prompt for it; "
                    "the header is learned with the reply."
                )
            return finished, start
        marked = renderer.marked(turn, finished.text)
        if prompt is None:
            return finished, len(marked)
        if opened := _OPENED_THOUGHT.search(prompt.text):
            self._note(
                "The chat template's generation prompt opens a thought: what a reply thinks is learned with it, "
                "an empty thought where a row has none."
            )
            return _with_thought(
                renderer.template, prompt, finished, len(marked), renderer.thought(turn, opened[1]), opened[1]
            )
        if (joint := renderer.joint(turn, prompt.text, history, marked)) is not None:
            # The template writes earlier turns differently once a reply follows (Mistral moves the system message).
            self._note(
                "The chat template rewrites what comes before a reply; replies are learned behind their prompts."
            )
            moved = len(prompt.text) - joint
            cuts = (*prompt.cuts, *(cut + moved for cut in finished.cuts if cut > joint))
            return Rendered(prompt.text + finished.text[joint:], cuts), len(prompt.text)
        # The finished reply is written differently from what the generation prompt begins. What both share is the
        # prompt; the finished form is what is learned.
        if history is None or not finished.text.startswith(history):
            raise RowError(
                f"a chat template that shows where message {turn + 1} starts", "one that rewrites what it renders"
            )
        self._note(
            "The chat template's generation prompt is not how it writes finished replies; "
            "the finished form is what is learned."
        )
        return finished, max(len(history), _shared(prompt.text, marked))

    def _note_left_out(self, conversation: Conversation, before: str, reply: str, turn: int) -> None:
        """Tell of what the template does not write of the conversation."""
        content = _content(conversation.messages[turn]).lstrip()
        if opened := _OPENED_THOUGHT.search(before):
            content = content.removeprefix(f"<{opened[1]}>")
        if "".join(content.split()) not in "".join(reply.split()):
            self._note("The chat template leaves out part of some replies, e.g. their thoughts; it is not learned.")
        for message in conversation.messages[:turn]:
            words = _WORDS.findall(_content(message))
            if message["role"] != "assistant" and words and words[-1] not in before:
                self._note(f"The chat template leaves out what some {message['role']} messages say.")
        if conversation.tools and str(conversation.tools[0]["function"]["name"]) not in before:
            self._note("The chat template leaves out the definitions of the tools.")

    def _end(self, rendered: Rendered, start: int) -> int | None:
        position = 0
        for text, is_control in split_control(rendered, self.tokenizer.control_texts):
            position += len(text)
            if is_control and position > start and text in self._ends:
                return position
        return None

    @cached_property
    def _ends(self) -> set[str]:
        """Control tokens that end a reply."""
        known = {text for text, index in self.tokenizer.control_ids.items() if index in self.tokenizer.eog_ids}
        return {*known, self._turn_end}

    @cached_property
    def _turn_end(self) -> str:
        """The control token that the template itself writes after a reply; empty when it writes none."""
        template = self.tokenizer.chat_template
        assert template is not None
        try:
            text = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]).text
        except UsageError:
            return ""
        pieces = split_control(Rendered(text.rpartition(_MARK)[2]), self.tokenizer.control_texts)
        return next((text for text, is_control in pieces if is_control), "")

    def _note(self, text: str) -> None:
        self.notes.setdefault(text)


class _Renderer:
    """Renders one conversation's beginnings, each at most once."""

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template = template
        self.conversation = conversation
        self.messages = _with_argument_text(conversation.messages) if self._wants_text() else conversation.messages
        self.mark = unused_character(template.source, json.dumps(conversation.messages, ensure_ascii=False))

    def _wants_text(self) -> bool:
        """Whether the template takes tool call arguments as JSON text (DeepSeek) rather than as an object (most)."""
        if not any(message.get("tool_calls") for message in self.conversation.messages):
            return False
        try:
            self._render(self.conversation.messages)
        except UsageError:
            try:
                self._render(_with_argument_text(self.conversation.messages))
            except UsageError:
                return False
            return True
        return False

    def _render(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        return self.template.render(messages, tools=self.conversation.tools or None, add_generation_prompt=prompt)

    def render(self, count: int) -> Rendered:
        """The first `count` messages, finished. Raises `RowError` when the template refuses them."""
        try:
            return self._render(self.messages[:count])
        except UsageError as error:
            raise RowError("a conversation the chat template takes", error.message) from error

    def prompt(self, turn: int) -> Rendered | None:
        """What the model is given to write message `turn`; None when the template cannot say."""
        return self._try(self.messages[:turn], prompt=True)

    def history(self, turn: int) -> str | None:
        """The messages before `turn`, finished."""
        rendered = self._try(self.messages[:turn])
        return None if rendered is None else rendered.text

    def _try(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered | None:
        try:
            return self._render(messages, prompt=prompt)
        except UsageError:
            return None

    def joint(self, turn: int, prompt: str, history: str | None, marked: str) -> int | None:
        """Where in `marked`, the finished text before a reply, the end of its prompt stands; None when it does not."""
        if history is None or not prompt.startswith(history):
            return None
        end = prompt[len(history) :]
        if not end:
            # No generation prompt: the prompt ends with what stands behind the last message.
            content = _content(self.messages[turn - 1]).strip()
            _, found, behind = prompt.rpartition(content)
            end = content + behind if content and found else ""
        at = marked.rfind(end) if end else -1
        return None if at < 0 else at + len(end)

    def marked(self, turn: int, text: str) -> str:
        """`text`, the rendering up to message `turn`, as far as where that message's content starts."""
        message = self.messages[turn]
        for content in (self.mark + _content(message), self.mark):
            rendered = self._try([*self.messages[:turn], {**message, "content": content}])
            before, found, _ = (rendered.text if rendered else "").partition(self.mark)
            if found and text.startswith(before):
                return before
        raise RowError(
            f"a chat template that shows where message {turn + 1} starts", "one that rewrites what it renders"
        )

    def thought(self, turn: int, name: str) -> str:
        """What message `turn` thinks before it answers, without the tags `name`; empty when it does not."""
        message = self.messages[turn]
        before, closed, _ = _content(message).partition(f"</{name}>")
        if closed:
            return before.strip().removeprefix(f"<{name}>").strip()
        found = (message.get(field) for field in _THOUGHT_FIELDS)
        return next((value.strip() for value in found if isinstance(value, str)), "")

    def opening(self, turn: int) -> str:
        """The beginning of what message `turn` says."""
        return _content(self.messages[turn]).strip()[:1]

    def after(self, turn: int) -> str:
        """What the template writes after the content of message `turn`, the last one."""
        rendered = self._try([*self.messages[:turn], {**self.messages[turn], "content": self.mark}])
        return (rendered.text if rendered else "").rpartition(self.mark)[2]


def _content(message: Message) -> str:
    return message.get("content") or ""


def _with_thought(
    template: ChatTemplate, prompt: Rendered, finished: Rendered, content_start: int, thought: str, name: str
) -> tuple[Rendered, int]:
    """`prompt`, which opens a thought, then `thought`, its end and the answer of `finished`; where the reply starts."""
    shielded, start = template.shielded(thought), len(prompt.text)
    spoken = prompt.text + shielded.text + f"\n</{name}>\n\n"
    answer = finished.text[content_start:].lstrip()
    if f"</{name}>" in answer:
        # This template keeps the thought that the content began with.
        answer = answer.partition(f"</{name}>")[2].lstrip()
    skipped = len(finished.text) - len(answer)
    cuts = (
        *prompt.cuts,
        *(cut + start for cut in shielded.cuts),
        *(cut - skipped + len(spoken) for cut in finished.cuts if cut > skipped),
    )
    return Rendered(spoken + finished.text[skipped:], cuts), start


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def _continues(longer: Rendered, shorter: Rendered, end: int) -> bool:
    """Whether `longer` begins with `shorter` up to `end`, control tokens included."""
    cuts = tuple(cut for cut in longer.cuts if cut < end)
    return longer.text[:end] == shorter.text[:end] and cuts == shorter.cuts


def _check_reply(reply: str, message: Message, turn: int) -> None:
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in reply:
            raise RowError("a chat template that writes tool calls", f"one that leaves out those of message {turn + 1}")
    words = _WORDS.findall(_content(message)) or _content(message).split()
    if words and words[-1] not in reply:
        raise RowError(f"a chat template that writes message {turn + 1}", "one that leaves it out")


def _with_argument_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    def as_text(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}

    return tuple(
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    )


def _splits(rendered: Rendered, regions: Sequence[tuple[int, int]]) -> list[int]:
    """Where the replies of a rendering begin and end inside it."""
    return sorted({at for region in regions for at in region if 0 < at < len(rendered.text)})


def _sequence(parts: Sequence[tuple[list[int], bool]]) -> Tokenized:
    ids = [index for part, _ in parts for index in part]
    learned = [flag for part, flag in parts for _ in part]
    return Tokenized(np.asarray(ids, dtype=np.int32), np.asarray(learned, dtype=np.bool_))


def iter_regions(sequence: Tokenized) -> Iterator[tuple[int, int]]:
    """The stretches of learned tokens of `sequence`, as (begin, end) positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], sequence.learned, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
