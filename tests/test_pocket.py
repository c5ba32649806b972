"""The embedded base model: its files, the generator behind it, its demo datasets, and that it really answers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from edgetune.fingerprint import read_safetensors_header
from models.pocket.evaluate import HERE, SEED, score
from models.pocket.exchange import is_held_out, is_trainable
from models.pocket.generate import SKILLS, conversations, held_out
from models.pocket.make_demos import SPLITS, all_rows, make_demos

CONTROL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


@pytest.fixture(scope="module")
def model() -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(HERE)


def test_sizes_fit_k_quants_and_the_repository() -> None:
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    tensors, _ = read_safetensors_header(HERE / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    assert all(tensor["shape"][-1] % 256 == 0 for tensor in tensors.values())
    assert (HERE / "model.safetensors").stat().st_size <= 12_000_000
    assert 2000 <= config["vocab_size"] <= 4096


def test_the_head_is_not_tied(model: Any) -> None:
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_tokenizer_knows_chatml_and_splits_digits(tokenizer: Any) -> None:
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS} == CONTROL_TOKENS
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    for text in ("Grüße, 東京 🙂\n\n  x", "a  b\tc", "", " lead"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_renders_chatml(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    assert text == "".join(turns) + "<|im_start|>assistant\n"


def test_generator_is_deterministic() -> None:
    assert list(islice(conversations(7), 50)) == list(islice(conversations(7), 50))
    assert list(islice(conversations(7), 50)) != list(islice(conversations(8), 50))
    assert held_out(SEED, 3) == held_out(SEED, 3)


def test_no_held_out_question_is_in_training() -> None:
    asked = {message["content"] for row in islice(conversations(0), 20_000) for message in row}
    for question in held_out(SEED, 40):
        if question.skill != "followups":  # there, what was said before belongs to the question
            assert question.messages[-1]["content"] not in asked


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_has_both_sides(skill: str) -> None:
    from random import Random

    rng = Random(0)
    drawn = [SKILLS[skill](rng) for _ in range(600)]
    assert any(map(is_held_out, drawn))
    assert any(map(is_trainable, drawn))
    assert not any(is_held_out(exchange) and is_trainable(exchange) for exchange in drawn)
    assert all(user and assistant for exchange in drawn for user, assistant in exchange.turns)


def test_demo_files_are_what_the_generator_makes(tmp_path: Path) -> None:
    make_demos(tmp_path)
    for path in sorted(tmp_path.rglob("*.jsonl")):
        committed = HERE / "demos" / path.relative_to(tmp_path)
        assert committed.read_bytes() == path.read_bytes()


def test_demo_rows_are_well_formed_and_disjoint() -> None:
    rows = all_rows()
    for demo in ("tickets", "persona"):
        questions = {split: {row["messages"][0]["content"] for row in rows[f"{demo}/{split}"]} for split in SPLITS}
        assert {split: len(found) for split, found in questions.items()} == SPLITS
        assert not questions["train"] & questions["valid"]
        assert not questions["test"] & (questions["train"] | questions["valid"])
    for row in (row for found in rows.values() for row in found):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in row["messages"])


def test_tickets_are_json_and_their_test_pairs_are_unseen() -> None:
    rows = all_rows()
    pairs: dict[str, set[tuple[str, str]]] = {}
    for split in SPLITS:
        tickets = [json.loads(row["messages"][1]["content"]) for row in rows[f"tickets/{split}"]]
        assert all(list(ticket) == ["product", "problem", "urgency"] for ticket in tickets)
        pairs[split] = {(ticket["product"], ticket["problem"]) for ticket in tickets}
    assert not pairs["test"] & pairs["train"]
    assert not pairs["valid"] & pairs["train"]


def test_it_answers_held_out_questions_and_stops(model: Any, tokenizer: Any) -> None:
    scores = score(model, tokenizer, held_out(SEED, 8))
    assert scores["all"].exact_match >= 0.85
    assert scores["all"].ended == scores["all"].asked
