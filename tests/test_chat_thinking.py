"""Reasoning is told from the answer by what the template and the vocabulary say; tool calls are seen and answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgetune.chat import Conversation, Node, Tree
from edgetune.chat.attachments import attach_files, path_start
from edgetune.chat.thinking import Thinking, find_thinking
from edgetune.chat.tool_calls import calls_tool
from edgetune.cli.line_mode import show_reply
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import FinishReason, LoraSpec, Timings, TokenChoice
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError
from edgetune.template import ChatTemplate, Rendered, split_control
from tests.checkpoints import CHATML
from tests.ggufs import base_gguf

_TURNS = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>assistant\n%ANSWER%<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n%OPEN%{% endif %}"
)


def _template(answer: str, *, opened: str = "", control: Iterable[str] = ()) -> ChatTemplate:
    source = _TURNS.replace("%ANSWER%", answer).replace("%OPEN%", opened)
    return ChatTemplate(source, {}, frozenset({"<|im_start|>", "<|im_end|>", *control}))


# As Qwen3: a field, shown for the last answer alone, empty tags where there is none.
FIELD = _template(
    "{% if loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
)
# As DeepSeek-R1: the prompt opens it, old answers lose it.
STRIPS = _template("{{ m.content.split('</think>')[-1] }}", opened="<think>\n")
# As SmolLM3 and many others: tags in the source, nothing done about them.
KEEPS = _template("{% if false %}<reasoning></reasoning>{% endif %}{{ m.content }}")
# As Command-R: control tokens, which a reply's text does not spell.
CONTROL = _template(
    "{% if m.thinking %}<|START_THINKING|>{{ m.thinking }}<|END_THINKING|>{% endif %}{{ m.content }}",
    control=["<|START_THINKING|>", "<|END_THINKING|>"],
)
# As gpt-oss: channels.
CHANNELS = _template(
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}",
    control=["<|channel|>", "<|message|>", "<|end|>", "<|start|>"],
)
TOOLS = _template(
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)


class Words:
    """A vocabulary of characters and control tokens."""

    def __init__(self, template: ChatTemplate) -> None:
        self.chat_template = template
        self.controls = {text: -1 - number for number, text in enumerate(sorted(template.control_tokens))}

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        pieces = split_control(rendered, self.chat_template.control_tokens)
        return [
            token for text, control in pieces for token in ([self.controls[text]] if control else self.encode(text))
        ]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        names = {token: text for text, token in self.controls.items()}
        return "".join(chr(one) if one >= 0 else names[one] if special else "" for one in ids).encode()


class Scripted:
    """A generation that says what it was told to."""

    def __init__(self, words: Words, prompt: Sequence[int], said: str) -> None:
        self.text, self.seed, self.context_full, self.is_whole = "", 1, False, True
        self.ids: list[int] = []
        self.choices: list[TokenChoice] = []
        self.finish_reason: FinishReason | None = None
        self._prompt, self._words = len(prompt), words
        self._coming = words.encode_rendered(Rendered(said))

    @property
    def timings(self) -> Timings:
        return Timings(self._prompt, 0, 0.0, len(self.ids), 0.0, 0.0)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._coming and self.finish_reason is None:
            self.ids.append(self._coming.pop(0))
            if text := self._words.decode(self.ids[-1:]).decode():
                self.text += text
                return text
        self.finish_reason = self.finish_reason or "stop"
        raise StopIteration

    def close(self) -> None:
        self.finish_reason = self.finish_reason or "interrupted"

    def cancel(self) -> None:
        self.close()

    def change_sampling(self, sampling: Sampling) -> None: ...

    def change_adapters(self) -> None: ...


class ScriptedEngine:
    """An engine that says one text after the other, and keeps the prompts it was given."""

    def __init__(self, template: ChatTemplate, *said: str) -> None:
        self.tokenizer = Words(template)
        self.context_size, self.cached_tokens = 100_000, 0
        self.adapters: tuple[LoraSpec, ...] = ()
        self.memory = SimpleNamespace(weights=0, context=0, per_token=0)
        self.prompts: list[str] = []
        self._said = list(said)

    def generate(self, ids: Sequence[int], sampling: Sampling, **_: Any) -> Scripted:
        self.prompts.append(self.tokenizer.decode(ids, special=True).decode())
        return Scripted(self.tokenizer, ids, self._said.pop(0))


def _talk(template: ChatTemplate, *said: str) -> tuple[Conversation, ScriptedEngine, list[Node]]:
    engine = ScriptedEngine(template, *said)
    conversation = Conversation(engine)  # type: ignore[arg-type]
    nodes = []
    for _ in said:
        reply = conversation.ask("Well?")
        "".join(reply)
        nodes.append(reply.node)
    return conversation, engine, nodes


CASES = {
    "field": (FIELD, "<think>\nhm\n</think>\n\nYes.", "<think>", "</think>"),
    "strips": (STRIPS, "hm\n</think>\n\nYes.", "<think>", "</think>"),
    "keeps": (KEEPS, "<reasoning>hm</reasoning>Yes.", "<reasoning>", "</reasoning>"),
    "control": (CONTROL, "<|START_THINKING|>hm<|END_THINKING|>Yes.", "<|START_THINKING|>", "<|END_THINKING|>"),
    "channels": (
        CHANNELS,
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_reasoning_is_kept_apart_and_not_sent_back(case: str) -> None:
    template, said, start, end = CASES[case]
    conversation, engine, (first, second) = _talk(template, said, said)
    thinking = conversation.thinking
    assert thinking
    assert (thinking.start, thinking.end) == (start, end)
    assert thinking.opened == (case == "strips")
    for node in (first, second):
        assert node.content == "Yes."
        assert node.meta["reasoning"] == "hm"
    assert conversation.messages[1] == {"role": "assistant", "content": "Yes."}
    assert "Yes." in engine.prompts[1]
    # The two that show a field for every answer asked for it; the others never see it again.
    assert ("hm" in engine.prompts[1]) == (case in ("control", "channels"))


def test_reasoning_that_the_template_shows_again_is_the_replys_own_tokens() -> None:
    for case in ("control", "channels"):
        template, said, _, _ = CASES[case]
        conversation, engine, (first,) = _talk(template, said)
        expected = engine.tokenizer.encode_rendered(Rendered(said))
        assert list(first.ids) == expected
        ids = conversation.prompt_ids()
        assert any(ids[at : at + len(expected)] == expected for at in range(len(ids)))


def test_how_it_is_sent_back_is_decided_by_the_template() -> None:
    sent = {case: found.sent for case in CASES if (found := find_thinking(CASES[case][0], Words(CASES[case][0])))}
    assert sent == {"field": "field", "strips": "whole", "keeps": "never", "control": "field", "channels": "field"}


def test_an_unfinished_reply_is_split_as_it_comes() -> None:
    thinking = Thinking("<think>", "</think>")
    assert thinking.split("", running=True) == ("", "")
    assert thinking.split("<thi", running=True) == ("", "")
    assert thinking.split("<thi") == ("", "<thi")
    assert thinking.split("<think>\nhm, a", running=True) == ("hm, a", "")
    assert thinking.split("<think>\nhm</th", running=True) == ("hm", "")
    assert thinking.split("<think>\nhm</think>\n\nYes") == ("hm", "Yes")
    assert thinking.split("No thought. <think>x</think>") == ("", "No thought. <think>x</think>")
    opened = Thinking("<think>", "</think>", opened=True)
    assert opened.split("hm", running=True) == ("hm", "")
    assert opened.split("<think>hm</think>Yes") == ("hm", "Yes")
    # A tool call may follow the reasoning in place of an answer.
    channels = Thinking("A<|m|>", "<|end|><|m|>", control_tokens=frozenset({"<|m|>", "<|end|>"}))
    assert channels.split("A<|m|>hm<|end|>", running=True) == ("hm", "")
    assert channels.split("A<|m|>hm<|end|>call") == ("hm", "call")


def test_a_model_that_does_not_reason_is_left_alone() -> None:
    plain = _template("{{ m.content }}")
    conversation, _, (node,) = _talk(plain, "<think>hm</think>Yes.")
    assert conversation.thinking is None
    assert node.content == "<think>hm</think>Yes."
    assert "reasoning" not in node.meta
    with LlamaEngine.open(base_gguf(), threads=1) as engine:
        assert Conversation(engine).thinking is None


def test_a_vocabulary_alone_can_tell() -> None:
    class Known(Words):
        def encode(self, text: str, *, add_special: bool = True) -> list[int]:
            return [1] if text in ("<seed:think>", "</seed:think>") else super().encode(text)

    template = _template("{{ m.content }}")
    found = find_thinking(template, Known(template))
    assert found == Thinking("<seed:think>", "</seed:think>")


def test_line_mode_prints_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for case in CASES:
        template, said, _, _ = CASES[case]
        engine = ScriptedEngine(template, said, said)
        conversation = Conversation(engine)  # type: ignore[arg-type]
        show_reply(conversation.ask("Well?"))
        captured = capsys.readouterr()
        assert captured.out == "Yes.\n"
        assert captured.err.startswith("hm\n\n")
        show_reply(conversation.ask("Well?"), with_speed=False)
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("Yes.\n", "")


def test_a_stopped_thought_is_kept() -> None:
    engine = ScriptedEngine(FIELD, "<think>hm, let me see</think>Yes.", "Sure.")
    conversation = Conversation(engine)  # type: ignore[arg-type]
    reply = conversation.ask("Well?")
    for _ in reply:
        if "let" in reply.text:
            break
    assert reply.parts() == ("hm, let", "")
    assert conversation.messages[-1]["content"] == ""
    assert conversation.tree.path()[-1].meta["reasoning"] == "hm, let"
    "".join(conversation.ask("Go on."))
    assert "let" not in engine.prompts[-1]


def test_the_real_qwen3_template(shared_data: Path) -> None:
    import json

    values = json.loads((shared_data / "tokenizers" / "qwen3" / "tokenizer_config.json").read_text())
    template = ChatTemplate(values["chat_template"], {}, frozenset({"<|im_start|>", "<|im_end|>"}))
    said = "<think>\nhm\n</think>\n\nYes."
    _, engine, (first, _) = _talk(template, said, said)
    assert (first.content, first.meta["reasoning"]) == ("Yes.", "hm")
    assert "hm" not in engine.prompts[1]
    assert calls_tool(template, '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>', offered=True)


def test_tool_calls_are_seen_and_answered_by_hand() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
    engine = ScriptedEngine(TOOLS, call, "It is warm.")
    conversation = Conversation(engine)  # type: ignore[arg-type]
    reply = conversation.ask("How is the weather?")
    "".join(reply)
    assert reply.node.meta["calls_tool"]
    answer = conversation.ask('{"temperature": 21}', role="tool")
    assert "".join(answer) == "It is warm."
    assert "calls_tool" not in answer.node.meta
    assert engine.prompts[-1].endswith(
        f'{call}<|im_end|>\n<|im_start|>tool\n{{"temperature": 21}}<|im_end|>\n<|im_start|>assistant\n'
    )
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]


def test_a_template_named_tool_use_is_taken_where_there_are_tools() -> None:
    plain = _template("{{ m.content }}")
    for_tools = ChatTemplate("{{ tools[0].function.name }}\n" + TOOLS.source, {}, plain.control_tokens)
    engine = ScriptedEngine(
        replace(plain, tool_source=for_tools.source), *['<tool_call>{"name": "look"}</tool_call>'] * 3
    )
    conversation = Conversation(engine)  # type: ignore[arg-type]
    "".join(conversation.ask("x"))
    assert engine.prompts[-1].startswith("<|im_start|>user\nx")
    assert "calls_tool" not in conversation.tree.path()[-1].meta
    conversation.tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    "".join(conversation.ask("y"))
    assert engine.prompts[-1].startswith("look\n<|im_start|>user\nx")
    assert conversation.tree.path()[-1].meta["calls_tool"]
    conversation.tools = ()
    "".join(conversation.ask("z"))
    assert engine.prompts[-1].startswith("<|im_start|>user\nx")


def test_an_answer_in_json_is_no_tool_call() -> None:
    bare = _template(
        '{{ m.content or \'\' }}{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}"}{% endfor %}'
    )
    assert calls_tool(bare, '{"name": "look"}', offered=True)
    assert not calls_tool(bare, '{"name": "look"}', offered=False)
    plain = _template("{{ m.content }}")
    assert not calls_tool(plain, "<tool_call>", offered=True)


def test_a_template_without_tool_messages_refuses_them() -> None:
    skips = ChatTemplate(CHATML.replace("{% for", "{% for", 1), {}, frozenset({"<|im_start|>", "<|im_end|>"}))
    quiet = ChatTemplate(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}", {}, frozenset()
    )
    conversation, _, _ = _talk(quiet, "call")
    nodes = len(conversation.tree.nodes)
    with pytest.raises(UsageError, match="no place for a tool"):
        conversation.ask("21", role="tool")
    assert len(conversation.tree.nodes) == nodes
    engine = ScriptedEngine(skips, "a", "b")
    conversation = Conversation(engine)  # type: ignore[arg-type]
    "".join(conversation.ask("x"))
    "".join(conversation.ask("21", role="tool"))
    assert "tool\n21" in engine.prompts[-1]


def test_files_are_attached_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("# Notes\r\n```\ncode\n```\n")
    (tmp_path / "two words.txt").write_text("\ufeffgrüße", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    assert attach_files("Sum up @notes.md, please; @notes.md!") == (
        "Sum up @notes.md, please; @notes.md!\n\nnotes.md:\n````md\n# Notes\n```\ncode\n```\n````"
    )
    assert attach_files('@"two words.txt"').endswith("two words.txt:\n```txt\ngrüße\n```")
    for text in ("mail a@notes.md", "@anna hello", '@app.route("/x")\n@dataclass', "@sub", "@", "@types/node"):
        assert attach_files(text) == text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("./missing.txt", None, "no file"),
        ("./sub", None, "directory"),
        ("./binary.bin", b"\x00\x01", "no text"),
        ("./latin.txt", b"gr\xfc\xdfe", "no text"),
        ("./large.txt", b"x" * 1_000_001, "1.0 MB"),
    ],
)
def test_what_cannot_be_attached_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        attach_files(f"Look at @{name}")


def test_paths_are_completed() -> None:
    assert path_start("look at @src/ma") == "src/ma"
    assert path_start("@") == ""
    assert path_start("a@b") is None
    assert path_start("@a b") is None


def test_a_long_history_is_not_rendered_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    template = _template("{{ m.content }}")
    tree = Tree()
    for number in range(64):
        tree.add(Node("user", f"Question {number}?", parent=tree.head))
        tree.add(Node("assistant", "Yes.", parent=tree.head, ids=(89, 101, 115, 46)))
    engine = ScriptedEngine(template, "Sure.")
    engine.context_size = 1000
    rendered: list[int] = []
    render = ChatTemplate.render

    def counted(self: ChatTemplate, messages: Any, **options: Any) -> Rendered:
        rendered.append(len(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    conversation = Conversation(engine, tree=tree)  # type: ignore[arg-type]
    reply = conversation.ask("And?")
    assert reply.dropped_turns > 32
    assert sum(length > 2 for length in rendered) <= 10
    assert reply.timings.prompt_tokens <= 750
    # As few turns left as it takes.
    one_more = conversation.first_in_context - 2
    conversation.first_in_context = one_more
    assert len(conversation.prompt_ids()) > 750
