"""A reply that is being made: its text as it comes, and the message it becomes, however it ends.

Made by `Conversation`. One thread iterates; `cancel` and `change_sampling` may be called from any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgetune.chat.presets import changes
from edgetune.chat.prompt import Prompt
from edgetune.chat.tool_calls import calls_tool
from edgetune.chat.tree import Node
from edgetune.engine.protocol import FinishReason, Generation, Timings, TokenChoice
from edgetune.engine.sampling import Sampling

if TYPE_CHECKING:
    from edgetune.chat.conversation import Conversation


class Reply:
    """Iterate over it for text. Its message enters the tree with the first word."""

    def __init__(
        self,
        conversation: Conversation,
        generation: Generation,
        *,
        prompt: Prompt,
        node: Node,
        head_before: str | None,
        dropped: int,
        known: Sequence[TokenChoice] = (),
    ) -> None:
        """Nothing is evaluated before the first step; `head_before` is where the conversation returns to if nothing is
        said; `known` is what the tokens that the reply begins with were chosen from."""
        self.generation = generation
        """The engine's side of it."""
        self.node = node
        """The message it becomes; complete when the iteration has ended."""
        self.dropped_turns = dropped
        """How many of the oldest turns had to leave the context for this one."""
        self._conversation, self._prompt, self._head_before = conversation, prompt, head_before
        self._known = tuple(known)
        self._is_over = False

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.generation:
                self.take_note()
                yield text
        finally:
            # Also when the consumer stops listening or Ctrl-C arrives: what was said is kept.
            self.stop()

    def stop(self) -> None:
        """End it here; what was said so far is kept. A turn in which nothing was said is taken back."""
        self.generation.close()
        if self._is_over:
            return
        self._is_over = True
        conversation = self._conversation
        if not self.text and not self.generation.ids and self.finish_reason == "interrupted":
            if conversation.tree.head == self.node.parent:
                conversation.tree.head = self._head_before
            self._tell()
            return
        self._enter()
        self.update()
        conversation.remember(self._prompt, self.node)
        self._tell(self.node)

    def cancel(self) -> None:
        """Let the iteration end by itself, after the next token at the latest. For any thread."""
        self.generation.cancel()

    def change_sampling(self, sampling: Sampling) -> None:
        """Choose by other parameters from the next token on. For any thread."""
        self.generation.change_sampling(sampling)
        self.node.meta["sampling"] = changes(sampling)

    def change_adapters(self) -> None:
        """Go on under the adapters that the engine has now, from the next token on. For the thread that iterates."""
        self.generation.change_adapters()
        self.node.meta.update(self._conversation.adapters_now)

    def take_note(self) -> None:
        """Something was said: called by whoever advances the generation."""
        self._enter()
        if self._conversation.recorder is not None:
            self._conversation.recorder.heard(self._conversation, self)

    def update(self) -> None:
        """Bring `node` up to what was said so far."""
        node, generation = self.node, self.generation
        node.ids, node.choices = tuple(generation.ids), list(self.choices)
        thinking = self._conversation.thinking
        node.content = generation.text
        if thinking is not None:
            running = generation.finish_reason is None
            thinking.read(node, generation.text, self._conversation.engine.tokenizer, running=running)
        tools = self._conversation.tools
        if calls_tool(self._conversation.template.in_force(tools), generation.text, offered=bool(tools)):
            node.meta["calls_tool"] = True
        node.meta["finish_reason"] = generation.finish_reason
        node.meta["seed"] = generation.seed
        if not generation.is_whole:
            node.meta["cut"] = True
        timings = self.timings
        node.meta["timings"] = {
            "prompt_tokens": timings.prompt_tokens,
            "reused_tokens": timings.reused_tokens,
            "generated_tokens": timings.generated_tokens,
            "tokens_per_second": round(timings.tokens_per_second, 2),
            "first_token_seconds": round(timings.first_token_seconds, 4),
        }

    @property
    def reasons(self) -> bool:
        """Whether the model marks its reasoning."""
        return self._conversation.thinking is not None

    def parts(self) -> tuple[str, str]:
        """(reasoning, answer) so far."""
        thinking = self._conversation.thinking
        if thinking is None:
            return "", self.text
        spelled = thinking.spell(self.text, self.generation.ids, self._conversation.engine.tokenizer)
        return thinking.split(spelled, running=self.finish_reason is None)

    @property
    def text(self) -> str:
        """What was said so far, reasoning and all."""
        return self.generation.text

    @property
    def choices(self) -> list[TokenChoice]:
        """What each token was chosen from, where the conversation records that."""
        own = self.generation.choices
        if not self._known or not own:
            return own
        kept = [replace(known, start=one.start, end=one.end) for known, one in zip(self._known, own, strict=False)]
        return [*kept, *own[len(kept) :]]

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs."""
        return self.generation.finish_reason

    @property
    def context_full(self) -> bool:
        """Whether it was cut because the context is full."""
        return self.generation.context_full

    @property
    def timings(self) -> Timings:
        """What it cost."""
        return self.generation.timings

    def _enter(self) -> None:
        tree = self._conversation.tree
        if self.node.id not in tree.nodes:
            tree.add(self.node)

    def _tell(self, *nodes: Node) -> None:
        if self._conversation.recorder is not None:
            self._conversation.recorder.changed(self._conversation, *nodes)
