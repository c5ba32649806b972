"""One conversation with one engine: what was said, what of it fits the context, and the replies that are being made.

The prompt is rendered anew for every turn; the engine evaluates only what its KV cache does not hold yet. When the
context is full, the oldest turns are left out of the prompt (never the system prompt) and stay in the history, or the
conversation stops: see `overflow`. What was said is kept as a tree (`tree`); storing it is a `Recorder`'s work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edgetune.chat.budget import Budget, Forecast, Overflow, count_turns
from edgetune.chat.presets import changes
from edgetune.chat.prompt import Prompt, PromptBuilder
from edgetune.chat.reply import Reply
from edgetune.chat.thinking import Thinking, find_thinking
from edgetune.chat.tree import Node, Tree
from edgetune.engine.protocol import Engine, LoraSpec, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate

Vote = Literal["up", "down", ""]
"""What a person thinks of a reply; empty is nothing yet."""


@dataclass(frozen=True)
class Setting:
    """One side of a comparison."""

    sampling: Sampling
    adapters: tuple[LoraSpec, ...] | None = None
    """None: those of the engine."""
    template: ChatTemplate | None = None
    """None: that of the conversation."""


class Recorder(Protocol):
    """Keeps what is said; see `autosave`."""

    def heard(self, conversation: Conversation, reply: Reply) -> None:
        """`reply` goes on; called for every piece of text."""

    def changed(self, conversation: Conversation, *nodes: Node) -> None:
        """`nodes` are new or other than before; with none of them, the head moved or a setting changed."""


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
        tree: Tree | None = None,
        top: int = 0,
        overflow: Overflow = "drop",
        vocabulary: str = "",
    ) -> None:
        """Start an empty conversation, or go on with `tree`; `template` stands in for the model's own.

        `vocabulary` tells the engine's from others: the tokens of a reply count only where they are of the same one.
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
        self.tree = tree or Tree()
        """Everything said, on every branch."""
        self.top = top
        """How many alternatives are recorded for each token; 0 records no choices."""
        self.overflow: Overflow = overflow
        """What happens when the context is full."""
        self.tools: tuple[Mapping[str, Any], ...] = ()
        """Functions the model is told it may call, as OpenAI describes them."""
        self.recorder: Recorder | None = None
        """Who keeps what is said."""
        self.first_in_context = 0
        """Index of the oldest message that still fits the context."""
        self._engine = engine
        self._vocabulary = vocabulary
        self._prompts = PromptBuilder(engine.tokenizer)
        self._thinking: tuple[ChatTemplate, Thinking | None] | None = None

    @property
    def engine(self) -> Engine:
        """What makes the replies."""
        return self._engine

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Every turn of the current branch in order, the system prompt not among them; a copy."""
        return [node.message for node in self.tree.path()]

    @property
    def thinking(self) -> Thinking | None:
        """How the model marks its reasoning; None when it does not reason."""
        if self._thinking is None or self._thinking[0] is not self.template:
            self._thinking = (self.template, find_thinking(self.template, self._engine.tokenizer))
        return self._thinking[1]

    def ask(self, text: str, *, role: Literal["user", "tool"] = "user") -> Reply:
        """Say `text` and get the reply: iterate over it for its text. As "tool", it answers a tool call.

        Raises `UsageError`, the conversation as it was, when the turn does not fit or the template refuses it.
        """
        node = Node(role, text, parent=self.tree.head)
        return self._answer([*self.tree.path(), node], new=node)

    def retry(self) -> Reply:
        """Make another reply beside the last one. Raises `UsageError` when there is none."""
        path = self.tree.path()
        if not path:
            raise UsageError("There is nothing to retry yet.")
        return self._answer(path[:-1] if path[-1].role == "assistant" else path)

    def undo(self) -> str:
        """Go back before the last question and its reply; returns the question. Raises `UsageError` at the start."""
        path = self.tree.path()
        if not path:
            raise UsageError("There is nothing to undo yet.")
        last = max((index for index, node in enumerate(path) if node.role == "user"), default=0)
        self._move(path[last].parent, first_in_context=min(self.first_in_context, last))
        return path[last].content

    def branch(self, node_id: str, token_index: int, alternative_id: int) -> Reply:
        """Another reply in the place of `node_id`: its tokens before `token_index`, then this one, then as it goes.

        Raises `UsageError` for a message without tokens of its own.
        """
        node = self.tree.node(node_id)
        if node.ids and not self._knows_tokens_of(node):
            raise UsageError("That reply was made with another vocabulary.", hint="Resume it with its own model.")
        if not 0 <= token_index < len(node.ids):
            raise UsageError(f"That message has {len(node.ids)} tokens of its own, none at {token_index}.")
        path = self.tree.path(node_id)[:-1]
        origin = {"branched_from": {"node": node_id, "token": token_index}}
        prefix = (*node.ids[:token_index], alternative_id)
        return self._answer(path, prefix=prefix, meta=origin, known=_chosen(node, token_index, alternative_id))

    def begin_reply(self, text: str) -> Reply:
        """Another reply in the place of the last one that begins with `text` and goes on from there."""
        path = self.tree.path()
        if not path:
            raise UsageError("There is nothing to reply to yet.")
        path = path[:-1] if path[-1].role == "assistant" else path
        return self._answer(path, prefix=self._engine.tokenizer.encode(text, add_special=False))

    def edit(self, node_id: str, text: str) -> Reply | None:
        """Put `text` in the place of a message, on a branch of its own; returns the reply, if it is a question."""
        node = self.tree.node(node_id)
        fields = {"fields": node.meta["fields"]} if node.meta.get("fields") else {}
        edited = Node(node.role, text, parent=node.parent, meta={"edited_from": node_id, **fields})
        if node.role != "assistant":
            return self._answer([*self.tree.path(node_id)[:-1], edited], new=edited)
        self.tree.add(edited)
        self._tell(edited)
        return None

    def select(self, node_id: str) -> Node:
        """Go on from the newest message of the branch that `node_id` is on; returns it."""
        node = self.tree.select(node_id)
        self._move(node.id, first_in_context=0)
        return node

    def siblings(self, node_id: str) -> list[Node]:
        """The messages in the place of this one, itself among them, oldest first."""
        return self.tree.siblings(node_id)

    def vote(self, node_id: str, vote: Vote) -> None:
        """Mark a reply as good or bad; empty takes the mark back. Raises `UsageError` for what is no reply."""
        node = self.tree.node(node_id)
        if node.role != "assistant":
            raise UsageError("Only a reply can be voted on.")
        node.meta.pop("vote", None)
        if vote:
            node.meta["vote"] = vote
        self._tell(node)

    def compare(self, text: str | None, settings: Sequence[Setting]) -> list[Reply]:
        """Replies to `text` (None: to the last question) under each of `settings`; run them with `run_together`."""
        path, new = self.tree.path(), None
        if text is not None:
            new = Node("user", text, parent=self.tree.head)
            path = [*path, new]
        elif path and path[-1].role == "assistant":
            path = path[:-1]
        replies: list[Reply] = []
        for setting in settings:
            replies.append(self._answer(path, new=new, setting=setting))
            new = None
        return replies

    def run_together(self, replies: Sequence[Reply]) -> Iterator[tuple[int, str]]:
        """Stream several replies side by side: (which one, text). Ends them all, however it ends."""
        try:
            for which, text in self._engine.run_together([reply.generation for reply in replies]):
                replies[which].take_note()
                yield which, text
        finally:
            for reply in replies:
                reply.stop()

    def clear(self) -> None:
        """Begin anew with an empty tree; system prompt and settings stay."""
        self.open(Tree())

    def replace(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Take over another history; a leading system message becomes the system prompt."""
        history = [dict(message) for message in messages]
        if history and history[0].get("role") == "system":
            self.system = str(history.pop(0).get("content", ""))
        tree = Tree()
        for message in history:
            role, content = str(message.pop("role")), message.pop("content", None)
            node = Node(role, content or "", parent=tree.head, meta={"fields": message} if message else {})
            tree.add(node)
        self.open(tree)

    def open(self, tree: Tree) -> None:
        """Go on with another tree."""
        self.tree = tree
        self.first_in_context = 0
        self._tell()

    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt for the next reply, from `first_in_context` on."""
        return self._prompt(self.tree.path(), self.first_in_context).ids

    def history_ids(self) -> list[int]:
        """Token ids of everything said, as the next prompt will begin."""
        return self._prompt(self.tree.path(), self.first_in_context, for_reply=False).ids

    def forecast(self, text: str = "") -> Forecast:
        """What happens to the context when `text` is said next, without saying it.

        Raises `UsageError` when the template refuses it.
        """
        path = [*self.tree.path(), Node("user", text, parent=self.tree.head)]
        first, prompt = self._fit(path)
        return self._budget.forecast(path, self.first_in_context, first, prompt)

    def _answer(
        self,
        path: list[Node],
        *,
        new: Node | None = None,
        prefix: Sequence[int] = (),
        meta: dict[str, Any] | None = None,
        setting: Setting | None = None,
        known: Sequence[TokenChoice] = (),
    ) -> Reply:
        """The reply to `path`, whose last message `new` enters the tree only when nothing is in the way.

        `known`: what the tokens of `prefix` were chosen from.
        """
        setting = setting or Setting(self.sampling)
        first, prompt = self._fit(path, template=setting.template)
        self._budget.check(path, prompt)
        if new is not None and new.role == "tool" and new.content.strip() not in prompt.text:
            raise UsageError(
                "The model's chat template has no place for a tool's answer.", hint="Say it as a message instead."
            )
        generation = self._engine.generate(
            prompt.ids,
            setting.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            prefix=prefix,
            top=self.top,
            adapters=setting.adapters,
            shift=self.overflow == "shift",
        )
        dropped = count_turns(path[self.first_in_context : first])
        before, self.first_in_context = self.tree.head, first
        if new is not None:
            self.tree.add(new)
            self._tell(new)
        else:
            self.tree.head = path[-1].id if path else None
        node = Node("assistant", "", parent=self.tree.head, meta={**(meta or {}), **self._describe(setting)})
        return Reply(self, generation, prompt=prompt, node=node, head_before=before, dropped=dropped, known=known)

    @property
    def adapters_now(self) -> dict[str, Any]:
        """What a reply's meta data say of the adapters applied now."""
        return _describe_adapters(self._engine.adapters)

    def _describe(self, setting: Setting) -> dict[str, Any]:
        return {
            **({"vocabulary": self._vocabulary} if self._vocabulary else {}),
            "sampling": changes(setting.sampling),
            **_describe_adapters(self._engine.adapters if setting.adapters is None else setting.adapters),
        }

    def _prompt(
        self, path: Sequence[Node], first: int, *, template: ChatTemplate | None = None, for_reply: bool = True
    ) -> Prompt:
        template = (template or self.template).in_force(self.tools)
        system = [{"role": "system", "content": self.system}] if self.system else []
        shown = path[first:]
        return self._prompts.build(
            template,
            [*system, *(self._outgoing(node) for node in shown)],
            replies=[node for node in shown if self._knows_tokens_of(node)],
            tools=self.tools,
            for_reply=for_reply,
        )

    def _knows_tokens_of(self, node: Node) -> bool:
        return bool(node.ids) and node.meta.get("vocabulary", "") == self._vocabulary

    def _outgoing(self, node: Node) -> dict[str, Any]:
        return self.thinking.message(node) if self.thinking and "reasoning" in node.meta else node.message

    @property
    def _budget(self) -> Budget:
        return Budget(self._engine.context_size, self.max_tokens, self.overflow)

    def _fit(self, path: list[Node], *, template: ChatTemplate | None = None) -> tuple[int, Prompt]:
        """(index of the first message shown, prompt), with as many of the oldest turns left out as it takes."""
        return self._budget.fit(path, self.first_in_context, lambda first: self._prompt(path, first, template=template))

    def remember(self, prompt: Prompt, node: Node) -> None:
        """Keep a reply's own tokens at hand, so that the next prompt continues them as they are."""
        self._prompts.remember(prompt, node)

    def _move(self, head: str | None, *, first_in_context: int) -> None:
        self.tree.head = head
        self.first_in_context = first_in_context
        self._tell()

    def _tell(self, *nodes: Node) -> None:
        if self.recorder is not None:
            self.recorder.changed(self, *nodes)


def _describe_adapters(adapters: Sequence[LoraSpec]) -> dict[str, Any]:
    return {"adapters": [{"path": str(one.path), "scale": one.scale} for one in adapters if one.scale]}


def _chosen(node: Node, token_index: int, alternative_id: int) -> list[TokenChoice]:
    """What the kept tokens of a reply and the alternative were chosen from, as far as that was recorded."""
    if len(node.choices) <= token_index:
        return []
    there = node.choices[token_index]
    found = next((one for one in there.alternatives if one.id == alternative_id), None)
    chances = (found.probability, found.sampled) if found else (0.0, 0.0)
    return [*node.choices[:token_index], TokenChoice(alternative_id, 0, 0, *chances, there.alternatives)]
