"""A conversation as a tree: nothing is lost, and replies are continued by their own tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.chat import Conversation, Node, Setting, Tree
from edgetune.chat.presets import apply_preset, changes, delete_preset, load_presets, save_preset, with_changes
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.sampling import Sampling
from edgetune.errors import CorruptFileError, UsageError
from tests.ggufs import base_gguf

POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket"
SAMPLING = Sampling(temp=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    from edgetune.export import export_base

    path = tmp_path_factory.mktemp("pocket") / "pocket.gguf"
    export_base(POCKET, path, sink=lambda event: None)
    with LlamaEngine.open(path, threads=1, ctx_size=2048) as opened:
        yield opened


@pytest.fixture
def chat(engine: LlamaEngine) -> Conversation:
    engine.forget()
    return Conversation(engine, sampling=SAMPLING, max_tokens=24, top=5)


def say(chat: Conversation, text: str) -> Node:
    reply = chat.ask(text)
    assert "".join(reply) == reply.text
    return reply.node


def contents(nodes: list[Node]) -> list[str]:
    return [node.content for node in nodes]


def test_a_tree_is_walked() -> None:
    tree = Tree()
    first = tree.add(Node("user", "a"))
    left = tree.add(Node("assistant", "b", parent=first.id))
    right = tree.add(Node("assistant", "c", parent=first.id))
    deep = tree.add(Node("user", "d", parent=right.id))
    assert contents(tree.path()) == ["a", "c", "d"]
    assert contents(tree.path(left.id)) == ["a", "b"]
    assert tree.siblings(left.id) == [left, right]
    assert tree.select(left.id) is left
    assert tree.head == left.id
    assert tree.select(right.id) is deep
    assert tree.leaves() == [left, deep]
    with pytest.raises(UsageError, match="nothing"):
        tree.node("nothing")
    with pytest.raises(UsageError):
        tree.add(Node("user", "x", parent="nobody"))
    again = Tree(list(tree.nodes.values()), head=left.id)
    assert contents(again.path()) == ["a", "b"]


def test_retry_undo_and_edit_lose_nothing(chat: Conversation) -> None:
    first = say(chat, "What is the capital of France?")
    chat.sampling = Sampling(seed=5, temp=3.0, top_k=0, top_p=1.0, min_p=0.0)
    reply = chat.retry()
    "".join(reply)
    second = reply.node
    assert chat.siblings(first.id) == [first, second]
    assert chat.messages[-1]["content"] == second.content
    question = chat.undo()
    assert chat.messages == []
    assert question == "What is the capital of France?"
    assert len(chat.tree.nodes) == 3
    assert chat.select(first.id) is first
    assert contents(chat.tree.path()) == [question, first.content]
    asked = first.parent
    assert asked
    edited = chat.edit(asked, "What is the capital of Spain?")
    assert edited
    "".join(edited)
    assert chat.messages[0]["content"] == "What is the capital of Spain?"
    assert [node.content for node in chat.siblings(asked)] == [question, "What is the capital of Spain?"]
    own = chat.edit(edited.node.id, "Madrid, of course.")
    assert own is None
    assert chat.messages[-1] == {"role": "assistant", "content": "Madrid, of course."}
    assert chat.tree.nodes[str(chat.tree.head)].meta["edited_from"] == edited.node.id
    assert len(chat.tree.nodes) == 6


def test_a_branch_keeps_what_came_before_the_alternative(chat: Conversation, engine: LlamaEngine) -> None:
    node = say(chat, "What is the capital of France?")
    assert len(node.choices) == len(node.ids) > 3
    assert "".join(node.generated[choice.start : choice.end] for choice in node.choices) == node.content
    index = 2
    other = next(one for one in node.choices[index].alternatives if one.id != node.ids[index])
    reply = chat.branch(node.id, index, other.id)
    assert "".join(reply) == reply.text == reply.node.content
    assert reply.node.ids[: index + 1] == (*node.ids[:index], other.id)
    assert chat.siblings(node.id) == [node, reply.node]
    # Its own beginning is seen as it was chosen, with what else there was.
    assert reply.node.choices[:index] == node.choices[:index]
    assert reply.node.choices[index].alternatives == node.choices[index].alternatives
    assert reply.node.choices[index].probability == other.probability
    assert reply.node.meta["branched_from"] == {"node": node.id, "token": index}
    # The same tokens from a cold start: nothing of the first reply is left in the way.
    engine.forget()
    assert "".join(chat.branch(node.id, index, other.id)) == reply.text
    taken = chat.branch(node.id, index, node.ids[index])
    assert "".join(taken) == node.content
    for bad in (-1, len(node.ids)):
        with pytest.raises(UsageError):
            chat.branch(node.id, bad, other.id)
    with pytest.raises(UsageError):
        chat.branch(str(node.parent), 0, other.id)


def test_stopping_before_the_first_word_goes_back_to_where_it_was(chat: Conversation) -> None:
    node = say(chat, "Hi")
    for reply in (chat.retry(), chat.ask("And?"), chat.branch(node.id, 0, node.ids[0])):
        reply.cancel()
        reply.stop()
        assert chat.tree.head == node.id
        assert len(chat.messages) == 2


def test_twenty_turns_evaluate_only_what_is_new(chat: Conversation, engine: LlamaEngine) -> None:
    # A question's own tokens, and what the template writes around it and after the reply before.
    encode = engine.tokenizer.encode
    around = len(encode_template(engine, "<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"))
    questions = [f"What is {number} plus {number * 3 % 7}?" for number in range(20)]
    for number, question in enumerate(questions):
        reply = chat.ask(question)
        "".join(reply)
        timings = reply.timings
        evaluated = timings.prompt_tokens - timings.reused_tokens
        # The last token of a reply that its limit cut was not evaluated yet.
        assert abs(evaluated - len(encode(question, add_special=False)) - around) <= (2 if number else around)


def encode_template(engine: LlamaEngine, text: str) -> list[int]:
    from edgetune.template import Rendered

    return engine.tokenizer.encode_rendered(Rendered(text))


def test_a_reply_is_continued_by_its_own_tokens_also_when_it_comes_from_elsewhere(chat: Conversation) -> None:
    """Sampled hot, a model splits words otherwise than the tokenizer; a new conversation over the tree must know."""
    chat.sampling = Sampling(seed=1, temp=5.0, top_k=0, top_p=1.0, min_p=0.0)
    nodes = [say(chat, "Tell me."), say(chat, "More."), say(chat, "Even more.")]
    expected = chat.prompt_ids()
    for node in nodes:
        assert _contains(expected, node.ids)
    fresh = Conversation(chat.engine, tree=chat.tree)
    assert fresh.prompt_ids() == expected
    assert fresh.history_ids()[: len(expected) - 12] == expected[: len(expected) - 12]
    fresh.system = "Be brief."
    for node in nodes:
        assert _contains(fresh.prompt_ids(), node.ids)
    assert any(
        list(node.ids) != chat.engine.tokenizer.encode(node.content, add_special=False)
        for node in nodes
        if node.content
    )


def _contains(ids: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(ids[start : start + len(part)]) == part for start in range(len(ids)))


def test_two_settings_side_by_side(chat: Conversation) -> None:
    hot = Sampling(seed=2, temp=4.0)
    replies = chat.compare("What is the capital of France?", [Setting(SAMPLING), Setting(hot)])
    heard = ["", ""]
    for which, text in chat.run_together(replies):
        heard[which] += text
    assert heard == [reply.text for reply in replies]
    first, second = (reply.node for reply in replies)
    assert first.parent == second.parent
    assert chat.siblings(first.id) == [first, second]
    assert second.meta["sampling"] == changes(hot)
    chat.select(first.id)
    engine = chat.engine
    assert isinstance(engine, LlamaEngine)
    engine.forget()
    assert "".join(chat.retry()) == first.content
    more = chat.compare(None, [Setting(SAMPLING)])
    assert [text for _, text in chat.run_together(more)]
    assert chat.messages[-1]["content"] == first.content


def test_votes(chat: Conversation) -> None:
    node = say(chat, "Hi")
    chat.vote(node.id, "up")
    assert node.meta["vote"] == "up"
    chat.vote(node.id, "")
    assert "vote" not in node.meta
    with pytest.raises(UsageError):
        chat.vote(str(node.parent), "up")


def test_what_a_reply_was_made_with_is_kept(chat: Conversation) -> None:
    reply = chat.ask("Hi")
    "".join(reply)
    meta = reply.node.meta
    assert meta["sampling"] == {"temp": 0}
    assert meta["finish_reason"] == reply.finish_reason
    assert meta["seed"] == reply.generation.seed
    assert meta["adapters"] == []
    assert meta["timings"]["generated_tokens"] == len(reply.node.ids)
    assert "cut" not in meta


def test_a_stop_string_marks_the_tokens_as_more_than_the_text(chat: Conversation) -> None:
    whole = say(chat, "What is the capital of France?").content
    chat.clear()
    chat.stop = (whole[4:8],)
    node = say(chat, "What is the capital of France?")
    assert node.content == whole[:4]
    assert node.meta["cut"]
    before = chat.prompt_ids()
    assert Conversation(chat.engine, tree=chat.tree).prompt_ids() == before


def test_overflow_is_told_before_it_happens_and_can_stop_the_chat() -> None:
    with LlamaEngine.open(base_gguf(), threads=1, ctx_size=256) as small:
        chat = Conversation(small, sampling=Sampling(temp=0, ignore_eos=True), max_tokens=20)
        foretold = []
        for number in range(6):
            text = f"This is message number {number}."
            forecast = chat.forecast(text)
            nodes = len(chat.tree.nodes)
            reply = chat.ask(text)
            assert len(chat.tree.nodes) == nodes + 1
            assert (reply.dropped_turns, reply.timings.prompt_tokens) == (forecast.dropped_turns, forecast.tokens)
            "".join(reply)
            foretold.append(forecast.dropped_turns)
        assert sum(foretold) > 0
        chat.clear()
        chat.overflow = "stop"
        while not chat.forecast("Again and again and again.").refused:
            "".join(chat.ask("Again and again and again."))
        with pytest.raises(UsageError, match="context is full"):
            chat.ask("Again and again and again.")
        assert chat.messages[-1]["role"] == "assistant"
        assert chat.first_in_context == 0
        chat.overflow = "drop"
        "".join(chat.ask("Again and again and again."))
        assert chat.first_in_context > 0


def test_presets(chat: Conversation) -> None:
    greedy = apply_preset("greedy", Sampling(seed=3, top_k=7), model="m")
    assert (greedy.temp, greedy.seed, greedy.top_k) == (0.0, 3, Sampling().top_k)
    assert apply_preset("balanced", greedy, model="m") == Sampling(seed=3)
    save_preset("mine", Sampling(temp=1.5, seed=9), model="m")
    assert load_presets("m")["mine"] == {"temp": 1.5}
    assert "mine" not in load_presets("another")
    assert apply_preset("mine", Sampling(), model="m") == Sampling(temp=1.5)
    with pytest.raises(UsageError, match="comes with"):
        save_preset("greedy", Sampling(), model="m")
    with pytest.raises(UsageError, match="mine"):
        apply_preset("mine", Sampling(), model="another")
    delete_preset("mine", model="m")
    with pytest.raises(UsageError):
        delete_preset("mine", model="m")
    assert with_changes(changes(Sampling(temp=0.3, top_k=2))) == Sampling(temp=0.3, top_k=2)
    with pytest.raises(CorruptFileError):
        with_changes({"temp": "hot"})
