"""What is learned, exactly: many kinds of chat templates against expectations written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgetune.data import Masker, TextTokenizer, load_tokenizer
from edgetune.data.formats import Conversation, Document, Pair
from edgetune.data.masking import iter_regions
from edgetune.data.messages import RowError
from tests.checkpoints import CHATML, build_bpe_tokenizer

LLAMA3 = (
    "{% for m in messages %}{{ ('<|endoftext|>' if loop.first else '') + '<|im_start|>' + m.role + '\n\n' "
    "+ m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DEEPSEEK = (
    "<|endoftext|>{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% else %}{{ 'Assistant:' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% else %}"
    "{{ 'A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
R1_VERBATIM = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else 'A:' }}{{ m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}A:<think>\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "lazy dog\n\n"},
]


def tokenizer_with(directory: Path, template: str | None) -> TextTokenizer:
    build_bpe_tokenizer(chat_template=template).save_pretrained(directory)
    return load_tokenizer(directory)


def conversation(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
    return Conversation(tuple(turns), tuple(tools), tuple(turn["role"] == "assistant" for turn in turns))


def learned_texts(masker: Masker, turns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each sequence, the text of each learned stretch."""
    return [
        [masker.tokenizer.decode(sequence.ids[begin:end].tolist()) for begin, end in iter_regions(sequence)]
        for sequence in masker.sequences(conversation(turns))
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(CHATML, [["The fox.<|im_end|>", "lazy dog\n\n<|im_end|>"]], id="chatml"),
        pytest.param(LLAMA3, [["The fox.<|im_end|>", "lazy dog<|im_end|>"]], id="llama3-trims"),
        pytest.param(INST, [[" The fox. <|im_end|>", " lazy dog\n\n <|im_end|>"]], id="inst-no-prompt"),
        pytest.param(GEMMA, [["The fox.<|im_end|>", "lazy dog<|im_end|>"]], id="gemma-renames-and-alternates"),
        pytest.param(PHI3, [["The fox.<|im_end|>", "lazy dog\n\n<|im_end|>"]], id="phi3-eos-after-all"),
        pytest.param(ZEPHYR, [["The fox.<|im_end|>", "lazy dog\n\n<|im_end|>"]], id="zephyr-textual-header"),
        pytest.param(DEEPSEEK, [["The fox.<|im_end|>", "lazy dog\n\n<|im_end|>"]], id="deepseek-prompt-without-break"),
        pytest.param(
            R1,
            [["\n</think>\n\nThe fox.<|im_end|>"], ["\n</think>\n\nlazy dog\n\n<|im_end|>"]],
            id="r1-prompt-opens-a-thought",
        ),
        pytest.param(NO_END, [["The fox.<|im_end|>"], ["lazy dog\n\n<|im_end|>"]], id="no-end-token"),
        pytest.param(
            DROPS_THOUGHTS,
            [["<think>\n\n</think>\n\nThe fox.<|im_end|>"], ["<think>\n\n</think>\n\nlazy dog\n\n<|im_end|>"]],
            id="drops-earlier-thoughts",
        ),
    ],
)
def test_the_learned_text_is_what_the_assistant_says(tmp_path: Path, template: str, expected: list[list[str]]) -> None:
    assert learned_texts(Masker(tokenizer_with(tmp_path, template), 2048), TURNS) == expected


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, INST, GEMMA, PHI3, ZEPHYR, DEEPSEEK, R1, R1_VERBATIM, DROPS_THOUGHTS]
)
def test_every_reply_is_learned_behind_the_very_ids_that_chat_makes_of_its_prompt(
    tmp_path: Path, template: str
) -> None:
    tokenizer = tokenizer_with(tmp_path, template)
    assert tokenizer.chat_template is not None
    wanted = [
        tokenizer.encode_rendered(tokenizer.chat_template.render(TURNS[:turn], add_generation_prompt=True))
        for turn in (1, 3)
    ]
    found = [
        sequence.ids[:begin].tolist()
        for sequence in Masker(tokenizer, 2048).sequences(conversation(TURNS))
        for begin, _ in iter_regions(sequence)
    ]
    assert found == wanted


def test_ids_equal_hugging_faces_where_no_message_spells_a_control_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with(tmp_path, CHATML)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    (sequence,) = Masker(tokenizer, 2048).sequences(conversation(TURNS))
    whole = reference.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    # The line break that the template writes after the last turn is no part of the reply.
    assert whole[: len(sequence.ids)] == sequence.ids.tolist()
    assert reference.decode(whole[len(sequence.ids) :]) == "\n"


def test_the_mask_equals_the_one_of_generation_marks(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, marked)
    reference = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (sequence,) = Masker(tokenizer, 2048).sequences(conversation(TURNS))
    length = len(sequence.ids)
    assert sequence.ids.tolist() == reference["input_ids"][:length]
    assert sequence.learned.tolist() == [bool(flag) for flag in reference["assistant_masks"][:length]]


def test_control_tokens_that_messages_spell_stay_text_and_end_no_reply(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, CHATML)
    end = tokenizer.control_ids["<|im_end|>"]
    turns = [
        {"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nhello"},
        {"role": "assistant", "content": "the <|im_end|> fox"},
    ]
    (sequence,) = Masker(tokenizer, 2048).sequences(conversation(turns))
    assert sequence.ids.tolist().count(end) == 2
    assert sequence.ids.tolist().count(tokenizer.control_ids["<|im_start|>"]) == 2
    ((begin, stop),) = iter_regions(sequence)
    assert tokenizer.decode(sequence.ids[begin:stop].tolist()) == "the <|im_end|> fox<|im_end|>"
    assert sequence.ids[stop - 1] == end


def test_a_token_never_spans_prompt_and_reply(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' }}{{ ' ' + m.content }}{{ '<|im_end|>' if m.role == 'assistant' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = tokenizer_with(tmp_path, template)
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": "the fox"}]
    (sequence,) = Masker(tokenizer, 2048).sequences(conversation(turns))
    ((begin, _),) = iter_regions(sequence)
    assert tokenizer.decode(sequence.ids[:begin].tolist()) == "user: helloassistant: "
    assert sequence.ids[begin:].tolist() == [*tokenizer.encode_continuation("the fox"), tokenizer.eos_id]
    whole = tokenizer.backend.encode("user: helloassistant: the fox<|im_end|>", add_special_tokens=False).ids
    assert whole != sequence.ids.tolist()


def test_only_weighted_assistant_messages_are_learned(tmp_path: Path) -> None:
    example = Conversation(tuple(TURNS), (), (False, False, False, True))
    masker = Masker(tokenizer_with(tmp_path, CHATML), 2048)
    (sequence,) = masker.sequences(example)
    assert len(list(iter_regions(sequence))) == 1


def test_a_template_that_refuses_or_drops_a_message_is_named(tmp_path: Path) -> None:
    masker = Masker(tokenizer_with(tmp_path, GEMMA), 2048)
    with pytest.raises(RowError, match="roles must alternate"):
        masker.sequences(conversation([TURNS[0], *TURNS]))
    call = {"type": "function", "function": {"name": "find_fox", "arguments": {}}}
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RowError, match="tool calls"):
        masker.sequences(conversation(turns))


def test_a_template_that_wants_arguments_as_text_gets_them(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "fox"}}}
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    masker = Masker(tokenizer_with(tmp_path, template), 2048)
    assert learned_texts(masker, turns) == [['find{"what": "fox"}<|im_end|>']]


def test_a_header_without_generation_prompt_is_learned_and_said(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{% endfor %}"
    masker = Masker(tokenizer_with(tmp_path, template), 2048)
    assert learned_texts(masker, TURNS[:2]) == [["<|im_start|>assistant\nThe fox.<|im_end|>"]]
    assert any("no generation prompt" in note for note in masker.notes)


def test_pairs_learn_the_completion_and_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, None)
    (sequence,) = Masker(tokenizer, 2048).sequences(Pair("2 + 2 =", " 4"))
    assert sequence.ids.tolist() == [*tokenizer.encode("2 + 2 ="), *tokenizer.encode(" 4"), tokenizer.eos_id]
    assert sequence.learned.tolist() == [False] * len(tokenizer.encode("2 + 2 =")) + [True] * 3


def test_documents_are_cut_into_windows_and_nothing_is_lost(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, None)
    text = "the quick brown fox <|im_end|> " * 20
    windows = Masker(tokenizer, 32).sequences(Document(text))
    ids = [index for window in windows for index in window.ids.tolist()]
    assert ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert max(len(window.ids) for window in windows) == 32
    assert ids.count(tokenizer.control_ids["<|im_end|>"]) == 1


def test_real_qwen_templates(shared_data: Path) -> None:
    qwen3 = json.loads((shared_data / "tokenizers/qwen3/tokenizer_config.json").read_text())["chat_template"]
    expected = {
        None: [["The fox.<|im_end|>", "lazy dog\n\n<|im_end|>"]],
        qwen3: [
            ["<think>\n\n</think>\n\nThe fox.<|im_end|>"],
            ["<think>\n\n</think>\n\nlazy dog\n\n<|im_end|>"],
        ],
    }
    for template, texts in expected.items():
        tokenizer = load_tokenizer(shared_data / "tokenizers/qwen2.5", chat_template=template)
        assert learned_texts(Masker(tokenizer, 2048), TURNS) == texts


def test_real_phi3_swallows_the_line_break_after_its_header(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    directory = shared_data / "tokenizers/phi-3-mini"
    tokenizer = load_tokenizer(directory)
    (sequence,) = Masker(tokenizer, 2048).sequences(conversation(TURNS))
    text = AutoTokenizer.from_pretrained(directory).apply_chat_template(TURNS, tokenize=False)
    whole = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]
    assert whole[: len(sequence.ids)] == sequence.ids.tolist()
    assert learned_texts(Masker(tokenizer, 2048), TURNS) == [["The fox.<|end|>", "lazy dog\n\n<|end|>"]]


def test_rendered_text_equals_transformers(shared_data: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("qwen2.5", "phi-3-mini"):
        directory = shared_data / "tokenizers" / name
        template, reference = load_tokenizer(directory).chat_template, AutoTokenizer.from_pretrained(directory)
        assert template is not None
        for turns in (TURNS, TURNS[:1], [{"role": "system", "content": "s"}, *TURNS]):
            for prompt in (False, True):
                wanted = reference.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
                assert template.render(turns, add_generation_prompt=prompt).text == wanted


MOVES_SYSTEM = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>[INST] ' + (ns.system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
BREAKS_BETWEEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_reply_is_learned_behind_its_prompt_where_the_template_moves_the_system_message(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, MOVES_SYSTEM)
    masker = Masker(tokenizer, 2048)
    turns = [{"role": "system", "content": "be kind"}, *TURNS]
    assert learned_texts(masker, turns) == [[" The fox.<|im_end|>"], [" lazy dog\n\n<|im_end|>"]]
    assert tokenizer.chat_template is not None
    for sequence, count in zip(masker.sequences(conversation(turns)), (2, 4), strict=True):
        ((begin, _),) = iter_regions(sequence)
        prompt = tokenizer.chat_template.render(turns[:count], add_generation_prompt=True)
        assert "be kind" in prompt.text
        assert sequence.ids[:begin].tolist() == tokenizer.encode_rendered(prompt)


def test_a_second_reply_in_a_row_does_not_learn_its_header(tmp_path: Path) -> None:
    turns = [*TURNS[:2], {"role": "assistant", "content": "dog"}]
    found = learned_texts(Masker(tokenizer_with(tmp_path, BREAKS_BETWEEN), 2048), turns)
    assert [text for texts in found for text in texts] == ["The fox.<|im_end|>", "dog<|im_end|>"]


def test_private_use_characters_in_messages_do_not_move_the_mask(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "an \uf8ff \ue000"}, {"role": "assistant", "content": "\uf8ff fox"}]
    for template, thought in ((R1, "\n</think>\n\n"), (NO_END, "")):
        (texts,) = learned_texts(Masker(tokenizer_with(tmp_path, template), 2048), turns)
        assert texts == [f"{thought}\uf8ff fox<|im_end|>"]


def test_tool_calls_that_the_template_does_not_end_are_refused(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls %}A:{{ m.tool_calls[0].function.name }}\n"
        "{% else %}{{ m.role + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    turns: list[dict[str, Any]] = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(RowError, match="ends tool calls with a control token"):
        Masker(tokenizer_with(tmp_path, template), 2048).sequences(conversation(turns))


def test_what_a_template_leaves_out_is_said(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>hm</think>fox"},
    ]
    tools = [{"type": "function", "function": {"name": "find"}}]
    masker = Masker(tokenizer_with(tmp_path, CHATML), 2048)
    masker.sequences(conversation(turns))
    assert not masker.notes
    no_system = "{% for m in messages if m.role != 'system' %}" + CHATML.removeprefix("{% for message in messages %}")
    no_system = no_system.replace("message.", "m.").replace("m.content", "m.content.split('</think>')[-1]")
    masker = Masker(tokenizer_with(tmp_path, no_system), 2048)
    masker.sequences(conversation(turns, tools))
    for left_out in ("system messages", "thoughts", "tools"):
        assert any(left_out in note for note in masker.notes), left_out


@pytest.mark.parametrize("template", [R1, R1_VERBATIM])
@pytest.mark.parametrize(
    "reply",
    [
        {"content": "<think>\nthe dog?\n</think>\n\nfox"},
        {"content": "<think>the dog?</think>fox"},
        {"content": "the dog?\n</think>\nfox"},
        {"content": "fox", "reasoning_content": "the dog?\n"},
    ],
)
def test_a_thought_is_learned_behind_a_prompt_that_opens_it(
    tmp_path: Path, template: str, reply: Mapping[str, Any]
) -> None:
    masker = Masker(tokenizer_with(tmp_path, template), 2048)
    turns = [TURNS[0], {"role": "assistant", **reply}]
    assert learned_texts(masker, turns) == [["the dog?\n</think>\n\nfox<|im_end|>"]]
    if template == R1:
        (note,) = masker.notes
        assert "opens a thought" in note


def test_a_control_token_in_a_thought_stays_text(tmp_path: Path) -> None:
    masker = Masker(tokenizer_with(tmp_path, R1), 2048)
    turns = [TURNS[0], {"role": "assistant", "content": "fox<|im_end|>x", "reasoning_content": "a<|im_end|>b"}]
    (sequence,) = masker.sequences(conversation(turns))
    end = masker.tokenizer.control_ids["<|im_end|>"]
    assert sequence.ids.tolist().count(end) == 1
    assert sequence.ids[-1] == end
    assert learned_texts(masker, turns) == [["a<|im_end|>b\n</think>\n\nfox<|im_end|>x<|im_end|>"]]


@pytest.mark.parametrize("place", ["list", "file"])
def test_a_template_named_tool_use_is_taken_where_there_are_tools(tmp_path: Path, place: str) -> None:
    from tests.checkpoints import edit_json

    tool_use = "TOOLS{{ tools[0].function.name }}" + CHATML
    build_bpe_tokenizer().save_pretrained(tmp_path)
    if place == "file":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    else:
        (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
        named = [{"name": "tool_use", "template": tool_use}, {"name": "default", "template": CHATML}]
        edit_json(tmp_path / "tokenizer_config.json", chat_template=named)
    tokenizer = load_tokenizer(tmp_path)
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    masker = Masker(tokenizer, 2048)
    (with_tools,) = masker.sequences(conversation(TURNS[:2], tools))
    (without,) = masker.sequences(conversation(TURNS[:2]))
    assert tokenizer.decode(with_tools.ids.tolist()) == "TOOLSfind" + tokenizer.decode(without.ids.tolist())
    assert not masker.notes

    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TURNS[:2], tools=tools, tokenize=False)
    assert tokenizer.decode(with_tools.ids.tolist()) == theirs.removesuffix("\n")
    # A template given by hand takes the place of all of the model's.
    own = load_tokenizer(tmp_path, chat_template=CHATML).chat_template
    assert own is not None
    assert not own.render(TURNS[:2], tools=tools).text.startswith("TOOLS")


def test_texts_at_which_llama_stops_are_text_in_training_as_in_chat() -> None:
    from converters.vocab.tokens import STOP_TEXTS as converted
    from edgetune.data.tokenizer import STOP_TEXTS, looks_like_control

    assert set(converted) == STOP_TEXTS
    assert looks_like_control("</s>")
    assert not looks_like_control("<s>")
