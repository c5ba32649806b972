"""`edgetune models show`: dimensions, memory and licence of checkpoints and GGUF files, without their weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgetune.artifacts import RUN_RECORD, Fingerprint, Run
from edgetune.cli.models import _types, command
from edgetune.export import export_base
from edgetune.library.describe import describe
from edgetune.library.sizes import Sizes, sizes_from_config
from tests.adapters import write_adapter
from tests.encoders import LABELS, write_encoder
from tests.ggufs import base_gguf, checkpoint
from tests.seq2seq_checkpoints import write_seq2seq
from tests.test_sentence_transformers import WIDTH, Module, pooling, write_modules

_BOTH = {"is_encoder_decoder": True, "d_model": 64}


def show(path: Path) -> dict[str, Any]:
    result = CliRunner().invoke(command, ["show", str(path), "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_a_checkpoint_and_its_gguf_have_the_same_dimensions(family: str) -> None:
    first, second = show(checkpoint(family)), show(base_gguf(family))
    for name in ("layers", "hidden_size", "heads", "kv_heads", "head_size", "context", "vocabulary"):
        assert first[name] == second[name], name
    assert first["feed_forward_size"] in (second["feed_forward_size"], None)


def test_memory_is_weights_and_cache(tmp_path: Path) -> None:
    shown = show(base_gguf("llama"))
    per_token = 2 * shown["layers"] * shown["kv_heads"] * shown["head_size"] * 2
    assert list(shown["memory"]) == ["512"]
    weights = shown["memory"]["512"] - 512 * per_token
    assert 0 < weights <= shown["bytes"]


def test_longer_contexts_up_to_the_models_own() -> None:
    sizes = Sizes(layers=2, hidden_size=8, heads=2, kv_heads=1, head_size=4, context=4096)
    assert list(sizes.memory(100, keeps_cache=True)) == [512, 2048, 4096]
    assert sizes.memory(100, keeps_cache=True)[4096] == 100 + 4096 * 2 * 2 * 4 * 2
    assert set(sizes.memory(100, keeps_cache=False).values()) == {100}
    assert Sizes(context=4096).memory(100, keeps_cache=True) == {}


def test_layers_with_a_window_keep_no_more_than_llama_cpp_does() -> None:
    # llama.cpp's own log: 16,384 cells for the whole text and 768 for windows of 64.
    shape = {"num_hidden_layers": 7, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {"model_type": "gemma3_text", **shape, "head_dim": 64, "max_position_embeddings": 16384}
    sizes = sizes_from_config({**config, "sliding_window": 64})
    assert (sizes.window, sizes.windowed_layers) == (64, 6)
    assert sizes.memory(0, keeps_cache=True)[16384] == (8 << 20) + (9 << 18)
    assert sizes.memory(0, keeps_cache=True)[512] == 7 << 18
    assert sizes_from_config({**config, "model_type": "mistral", "sliding_window": 64}).window is None


def test_a_mixture_of_experts_says_how_many_work() -> None:
    for path in (checkpoint("qwen3-moe"), base_gguf("qwen3-moe")):
        shown = show(path)
        assert (shown["experts"], shown["experts_used"], shown["expert_size"]) == (4, 2, 256)
    text = CliRunner().invoke(command, ["show", str(checkpoint("mixtral"))]).stdout
    assert "4, 2 for each token" in text


def test_a_type_of_few_parameters_is_not_none_at_all() -> None:
    text = CliRunner().invoke(command, ["show", str(base_gguf("llama3-rope"))]).stdout
    assert "F32: F32 100%" in text
    base = checkpoint("qwen3-moe")
    assert "F32 <1%" in _types(replace(describe(base), types={"F16": 9_999, "F32": 1}, parameters=10_000))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {**_BOTH, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 32},
            Sizes(layers=2, decoder_layers=3, hidden_size=64, heads=4, kv_heads=4, head_size=32),
        ),
        (
            {**_BOTH, "encoder_layers": 6, "decoder_layers": 1, "encoder_attention_heads": 8},
            Sizes(layers=6, decoder_layers=1, hidden_size=64, heads=8, kv_heads=8, head_size=8),
        ),
        (
            {"n_layers": 6, "dim": 768, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30522},
            Sizes(6, hidden_size=768, feed_forward_size=3072, heads=12, kv_heads=12, head_size=64, vocabulary=30522),
        ),
        (
            {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}},
            Sizes(layers=2, hidden_size=64, heads=4, kv_heads=4, head_size=32),
        ),
        (
            {
                "is_encoder_decoder": True,
                "encoder": {"num_hidden_layers": 3, "hidden_size": 64},
                "decoder": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
            },
            Sizes(layers=3, decoder_layers=2, hidden_size=64, heads=4, kv_heads=4, head_size=16),
        ),
        (
            {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": None},
            Sizes(layers=2, hidden_size=64, feed_forward_size=256, heads=4, kv_heads=4, head_size=16),
        ),
        ({}, Sizes()),
    ],
)
def test_every_familys_own_names(config: dict[str, Any], expected: Sizes) -> None:
    assert sizes_from_config(config) == expected


def test_the_licence_of_the_models_card(tmp_path: Path) -> None:
    import shutil

    model_dir = tmp_path / "hf"
    shutil.copytree(checkpoint("llama"), model_dir)
    assert show(model_dir)["licence"] == ""
    (model_dir / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert show(model_dir)["licence"] == "apache-2.0"
    (model_dir / "README.md").write_text("---\nlicense: [mit, other\n---\n")
    assert show(model_dir)["licence"] == ""


def test_an_adapter_from_elsewhere_is_no_run_and_names_its_base(tmp_path: Path) -> None:
    peft_dir = write_adapter(tmp_path / "peft", checkpoint("llama"), target_modules=["q_proj"])
    shown = show(peft_dir)
    assert (shown["rank"], shown["base_name"]) == (8, checkpoint("llama").name)
    text = CliRunner().invoke(command, ["show", str(peft_dir)]).stdout
    assert "PEFT adapter" in text
    assert "training run" not in text


def test_people_read_it_too() -> None:
    text = CliRunner().invoke(command, ["show", str(base_gguf("llama"))]).stdout
    assert "in memory" in text
    assert "with 512 tokens" in text
    assert "head size" in text


_DUTY = ("task", "labels", "pooling", "normalize", "prompts", "default_prompt", "longest_text", "context")


def duties(directory: Path) -> list[dict[str, Any]]:
    """Of a checkpoint and of its GGUF file."""
    gguf = directory.with_suffix(".gguf")
    export_base(directory, gguf, outtype="f16")
    return [{name: value for name, value in show(path).items() if name in _DUTY} for path in (directory, gguf)]


@pytest.mark.parametrize(
    ("problem", "task", "labels"),
    [
        (None, "classification", ["red", "green", "blue"]),
        ("multi_label_classification", "multilabel", ["red", "green", "blue"]),
        ("regression", "regression", []),
    ],
)
def test_a_classifiers_task_and_labels(problem: str | None, task: str, labels: list[str], tmp_path: Path) -> None:
    settings = {**LABELS, "problem_type": problem}
    directory = write_encoder(tmp_path / "one", "roberta", "ForSequenceClassification", overrides=settings)
    first, second = duties(directory)
    assert first == second
    assert (first["task"], first["labels"], first["pooling"]) == (task, labels, "")
    # 160 rows, of which RoBERTa leaves those up to its padding token's id.
    assert first["context"] == first["longest_text"] == 158


def test_what_a_sentence_model_makes_of_a_text(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "one", "bert")
    normalize: Module = ("Normalize", "2_Normalize", {}, {})
    write_modules(directory, [pooling(pooling_mode_cls_token=True, word_embedding_dimension=WIDTH), normalize])
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    first, second = duties(directory)
    assert first == second
    assert (first["task"], first["pooling"], first["normalize"]) == ("embedding", "cls", True)
    assert (first["context"], first["longest_text"]) == (160, 64)
    assert first["prompts"] == prompts["prompts"]
    text = CliRunner().invoke(command, ["show", str(directory)]).stdout
    assert "cls, brought to length 1" in text
    assert "query (default): 'query: '" in text


def test_the_tokenizers_limit_counts_where_no_other_is_set(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "one", "distilbert")
    (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 48}))
    first, second = duties(directory)
    assert first == second
    assert (first["context"], first["longest_text"], first["pooling"]) == (160, 48, "mean")


def test_the_words_t5_reads_as_a_task(tmp_path: Path) -> None:
    directory = write_seq2seq(tmp_path / "one", "t5")
    config = json.loads((directory / "config.json").read_text())
    config |= {"n_positions": 512, "task_specific_params": {"summarization": {"prefix": "summarize: ", "num_beams": 4}}}
    (directory / "config.json").write_text(json.dumps(config))
    first, second = duties(directory)
    assert first == second
    assert (first["task"], first["longest_text"]) == ("seq2seq", 512)
    assert first["prompts"] == {"summarization": "summarize: "}
    bart = show(write_seq2seq(tmp_path / "two", "bart"))
    assert (bart["task"], bart["longest_text"], bart["prompts"]) == ("seq2seq", 128, {})


def test_decoders_chat_where_they_have_a_template(tmp_path: Path) -> None:
    first, second = show(checkpoint("llama")), show(base_gguf("llama"))
    assert first["task"] == second["task"] == "chat"
    assert first["longest_text"] is second["longest_text"] is None


def test_what_a_run_was_trained_for(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    for task, data, expected in (
        ("classification", {"labels": ["no", "yes"]}, ("classification", ["no", "yes"], {})),
        ("classification", {"labels": ["no", "yes"], "multi_label": True}, ("multilabel", ["no", "yes"], {})),
        ("seq2seq", {"source_prefix": "summarize: "}, ("seq2seq", [], {"source": "summarize: "})),
    ):
        run = Run(path=tmp_path, base_path=tmp_path, base_name="base", fingerprint=Fingerprint(), task=task, data=data)
        (tmp_path / RUN_RECORD).write_text(json.dumps(run.record()))
        shown = show(tmp_path)
        assert (shown["task"], shown["labels"], shown["prompts"]) == expected
