"""One conversation with one engine: what was said, what of it fits the context, and the reply that is being made.

The prompt is rendered anew for every turn; the engine evaluates only what its KV cache does not hold yet. When the
context is full, the oldest turns are left out of the prompt (never the system prompt) and stay in the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.engine.protocol import Engine, FinishReason, Generation, Timings
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Rendered, split_control

_SHARE_FOR_REPLY = 4
"""One part in this many of the context is kept free for the reply when its length is not limited."""


_REMEMBERED = 15
"""How many earlier replies keep their own tokens; more than undo and retry go back in practice."""


@dataclass(frozen=True)
class _Prompt:
    """What the engine is asked to continue."""

    text: str
    ids: list[int]


class Conversation:
    """The turns of a chat and the settings they are answered with."""

    def __init__(
        self,
        engine: Engine,
        *,
        template: ChatTemplate | None = None,
        system: str = "",
        sampling: Sampling | None = None,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
    ) -> None:
        """Start an empty conversation; `template` stands in for the model's own.

        Raises `UsageError` when there is no chat template at all.
        """
        chosen = template or engine.tokenizer.chat_template
        if chosen is None:
            raise UsageError(
                "This model has no chat template, so it cannot tell turns apart.",
                hint="Let it continue a text instead: edgetune generate --raw MODEL PROMPT",
            )
        self.template = chosen
        self.system = system
        """The system prompt; empty leaves it to the template."""
        self.sampling = sampling or Sampling()
        self.max_tokens = max_tokens
        """Limit of new tokens a reply; -1 is the context."""
        self.stop = tuple(stop)
        """Strings that end a reply."""
        self.messages: list[dict[str, Any]] = []
        """Every turn in order, the system prompt not among them."""
        self.first_in_context = 0
        """Index of the oldest message that still fits the context."""
        self._engine = engine
        self._heard: list[_Prompt] = []

    def ask(self, text: str) -> Reply:
        """Say `text` and get the reply: iterate over it for its text.

        Raises `UsageError`, the conversation as it was, when the turn does not fit or the template refuses it.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return self._reply()
        except BaseException:
            self.messages.pop()
            raise

    def retry(self) -> Reply:
        """Drop the last reply and make another one. Raises `UsageError` when there is none."""
        if not self.messages:
            raise UsageError("There is nothing to retry yet.")
        answered = self.messages.pop() if self.messages[-1]["role"] == "assistant" else None
        try:
            return self._reply()
        except BaseException:
            if answered:
                self.messages.append(answered)
            raise

    def undo(self) -> str:
        """Take back the last turn, question and reply; returns the question. Raises `UsageError` when there is none."""
        if not self.messages:
            raise UsageError("There is nothing to undo yet.")
        last = max((index for index in range(len(self.messages)) if self._is_user(index)), default=0)
        question = str(self.messages[last].get("content", ""))
        del self.messages[last:]
        self.first_in_context = min(self.first_in_context, len(self.messages))
        return question

    def clear(self) -> None:
        """Forget every turn; system prompt and settings stay."""
        self.messages.clear()
        self.first_in_context = 0

    def replace(self, messages: Sequence[dict[str, Any]]) -> None:
        """Take over another history; a leading system message becomes the system prompt."""
        history = [dict(message) for message in messages]
        if history and history[0].get("role") == "system":
            self.system = str(history.pop(0).get("content", ""))
        self.messages = history
        self.first_in_context = 0

    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt for the next reply, from `first_in_context` on."""
        return self._prompt().ids

    def remember(self, prompt: _Prompt, generation: Generation) -> None:
        """Keep the reply's own tokens, so that the next prompt continues them as they are."""
        if generation.is_whole:
            heard = _Prompt(prompt.text + generation.text, [*prompt.ids, *generation.ids])
            self._heard = [*self._heard[-_REMEMBERED:], heard]

    def _prompt(self) -> _Prompt:
        system = [{"role": "system", "content": self.system}] if self.system else []
        shown = [*system, *self.messages[self.first_in_context :]]
        rendered = self.template.render(shown, add_generation_prompt=True)
        return _Prompt(rendered.text, self._encode(rendered))

    def _encode(self, rendered: Rendered) -> list[int]:
        # A model may split its words otherwise than the tokenizer does: a reply tokenized anew would no longer match
        # the KV cache. Its own tokens are taken where a control token follows, so that nothing merges across the edge.
        encode = self._engine.tokenizer.encode_rendered
        for heard in reversed(self._heard):
            if rendered.text.startswith(heard.text):
                start = len(heard.text)
                rest = Rendered(rendered.text[start:], tuple(cut - start for cut in rendered.cuts if cut >= start))
                if any(is_control for _, is_control in split_control(rest, self.template.control_tokens)[:1]):
                    return [*heard.ids, *encode(rest)]
        return encode(rendered)

    def _reply(self) -> Reply:
        before = self.first_in_context
        prompt = self._fit()
        generation = self._engine.generate(prompt.ids, self.sampling, max_tokens=self.max_tokens, stop=self.stop)
        return Reply(self, generation, prompt=prompt, dropped=self._count_turns(before, self.first_in_context))

    def _fit(self) -> _Prompt:
        """The prompt, with as many of the oldest turns left out as it takes."""
        size = self._engine.context_size
        wanted = self.max_tokens if self.max_tokens > 0 else size // _SHARE_FOR_REPLY
        room = size - min(wanted, size // 2)
        start = self.first_in_context
        prompt = self._prompt()
        while len(prompt.ids) > room and (following := self._next_turn(self.first_in_context)) is not None:
            self.first_in_context = following
            prompt = self._prompt()
        if len(prompt.ids) >= size:
            self.first_in_context = start
            raise UsageError(
                f"The message takes {len(prompt.ids)} tokens with the system prompt; the context has {size}.",
                hint="Shorten it, or start again with a larger context: -c",
            )
        return prompt

    def _next_turn(self, start: int) -> int | None:
        following = (index for index in range(start + 1, len(self.messages)) if self._is_user(index))
        return next(following, None)

    def _count_turns(self, start: int, end: int) -> int:
        return sum(self._is_user(index) for index in range(start, end))

    def _is_user(self, index: int) -> bool:
        return bool(self.messages[index]["role"] == "user")


class Reply:
    """A reply being made: iterate over it for text. It enters the history when it ends, however it ends."""

    def __init__(self, conversation: Conversation, generation: Generation, *, prompt: _Prompt, dropped: int) -> None:
        """Made by `Conversation`; nothing is evaluated before the first step."""
        self.dropped_turns = dropped
        """How many of the oldest turns had to leave the context for this one."""
        self._conversation, self._generation, self._prompt = conversation, generation, prompt
        self._recorded = False

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._generation
        finally:
            # Also when the consumer stops listening or Ctrl-C arrives: what was said is kept.
            self.stop()

    def stop(self) -> None:
        """End it here; what was said so far is kept. A turn in which nothing was said is taken back."""
        self._generation.close()
        if self._recorded:
            return
        self._recorded = True
        messages = self._conversation.messages
        if self.text or self.finish_reason != "interrupted":
            messages.append({"role": "assistant", "content": self.text})
            self._conversation.remember(self._prompt, self._generation)
        elif messages and messages[-1]["role"] == "user":
            messages.pop()

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._generation.text

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs."""
        return self._generation.finish_reason

    @property
    def context_full(self) -> bool:
        """Whether it was cut because the context is full."""
        return self._generation.context_full

    @property
    def timings(self) -> Timings:
        """What it cost."""
        return self._generation.timings
