"""An adapter merged into its base on the way to GGUF: the weights PEFT's own merge has, and what PEFT runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CorruptCheckpoint, UnsupportedAdapter, UnsupportedModel, convert_base
from converters.base import find_family
from converters.checkpoint import SafetensorsCheckpoint, load_float32
from converters.config import read_config
from converters.merge import merge_adapter
from edgetune.gguf_header import read_gguf_header
from tests.adapters import gguf_logits, peft_logits, write_adapter
from tests.checkpoints import build_bpe_tokenizer, edit_json, write_checkpoint
from tests.llama_logits import max_kl

Base = Callable[[str], Path]

EMBEDDING = {"gpt2": "wte"}
ATTENTION = {"gpt2": "c_attn", "phi3": "qkv_proj"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 4}}),
    "llama dora": ("llama", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "llama saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "llama saved norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}),
    "llama token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 44]}),
    "qwen2 trained biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "qwen2 lora only biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "qwen2 lora bias": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "phi3 dora": ("phi3", {"target_modules": "all-linear", "use_dora": True}),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "use_dora": True}),
    "tied embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied kept tied": ("llama-tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied saved embedding": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied token rows": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]}),
    "tied token rows apart": (
        "llama-tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [9]}},
    ),
    "gpt2 tied embedding": ("gpt2", {"target_modules": ["wte"]}),
    "gemma3 tied embedding": ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
    "qwen3-moe experts": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}

VOCABULARY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama both saved": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama resized alone": ("llama", {}),
    "llama token rows": ("llama", {"trainable_token_indices": [5, 372, 380]}),
    "tied resized alone": ("llama-tied", {}),
    "tied adapted embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(f"merge-{family}") / "tiny", family)
        return made[family]

    return make


@pytest.mark.parametrize("case", CASES)
def test_runs_as_peft_runs_it(base: Base, tmp_path: Path, case: str) -> None:
    family, settings = CASES[case]
    adapter_dir = write_adapter(tmp_path / "adapter", base(family), **settings)
    convert_base(base(family), tmp_path / "merged.gguf", outtype="f16", merge=adapter_dir)
    expected = peft_logits(base(family), adapter_dir)
    assert max_kl(peft_logits(base(family), None), expected) > 0.1, "the adapter has to matter"
    assert max_kl(expected, gguf_logits(tmp_path / "merged.gguf")) < 1e-3


@pytest.mark.parametrize("case", VOCABULARY)
def test_larger_vocabulary_comes_from_the_adapter(base: Base, tmp_path: Path, case: str) -> None:
    family, settings = VOCABULARY[case]
    settings = {"target_modules": ["q_proj"], **settings}
    adapter_dir = write_adapter(tmp_path / "adapter", base(family), resize=384, **settings)
    tokenizer = build_bpe_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(384 - len(tokenizer))])
    with pytest.raises(UnsupportedAdapter, match="no tokenizer"):
        convert_base(base(family), tmp_path / "merged.gguf", merge=adapter_dir)
    tokenizer.save_pretrained(adapter_dir)
    convert_base(base(family), tmp_path / "merged.gguf", outtype="f16", merge=adapter_dir)
    header = read_gguf_header(tmp_path / "merged.gguf", arrays=True)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert (len(tokens), tokens[-1]) == (384, "<new12>")
    ids = [5, 17, 372, 44, 380, 9, 77, 300]
    expected = peft_logits(base(family), adapter_dir, ids, resize=384)
    assert max_kl(expected, gguf_logits(tmp_path / "merged.gguf", ids=ids)) < 1e-3


@pytest.mark.parametrize("case", ["llama", "llama dora", "llama saved norm", "qwen2 trained biases", "gpt2 dora"])
def test_weights_are_those_of_pefts_own_merge(base: Base, tmp_path: Path, case: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    family, settings = CASES[case]
    adapter_dir = write_adapter(tmp_path / "adapter", base(family), **settings)
    model = AutoModelForCausalLM.from_pretrained(base(family), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload().state_dict()
    with SafetensorsCheckpoint(base(family)) as checkpoint:
        merged = merge_adapter(checkpoint, adapter_dir, base_dir=base(family), values=read_config(base(family)))
        for name in merged.checkpoint.names:
            if case == "gpt2 dora" and name in ("transformer.wte.weight", "lm_head.weight"):
                continue  # PEFT's merge changes the tied head too; what it runs does not (see the logits above).
            np.testing.assert_allclose(load_float32(merged.checkpoint, name), theirs[name].numpy(), atol=2e-6)


def test_a_tied_head_that_nothing_changed_stays_tied(base: Base, tmp_path: Path) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama-tied"), target_modules=["q_proj"])
    convert_base(base("llama-tied"), tmp_path / "merged.gguf", merge=adapter_dir)
    assert "output.weight" not in {tensor.name for tensor in read_gguf_header(tmp_path / "merged.gguf").tensors}


def test_a_bfloat16_base_is_merged_with_more_digits(tmp_path: Path) -> None:
    base_dir = write_checkpoint(tmp_path / "tiny", "llama", dtype="bfloat16")
    adapter_dir = write_adapter(tmp_path / "adapter", base_dir, target_modules=["q_proj"], strength=0.01)
    convert_base(base_dir, tmp_path / "merged.gguf", merge=adapter_dir)
    assert max_kl(peft_logits(base_dir, adapter_dir), gguf_logits(tmp_path / "merged.gguf")) < 1e-4


def test_a_graph_without_head_refuses_an_untied_one(base: Base, tmp_path: Path) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("gemma2"), target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedModel, match="shares"):
        convert_base(base("gemma2"), tmp_path / "merged.gguf", merge=adapter_dir)


def test_a_bias_where_the_base_has_none_is_refused(base: Base, tmp_path: Path) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama"), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UnsupportedAdapter, match="lora_bias"):
        convert_base(base("llama"), tmp_path / "merged.gguf", merge=adapter_dir)


def test_a_vocabulary_changed_in_one_place_is_refused(base: Base, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"]}
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama"), resize=384, **settings)
    with pytest.raises(UnsupportedAdapter, match="one place only"):
        convert_base(base("llama"), tmp_path / "merged.gguf", merge=adapter_dir)


def test_rows_and_indices_must_agree(base: Base, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]}
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama"), **settings)
    edit_json(adapter_dir / "adapter_config.json", trainable_token_indices=[5])
    with pytest.raises(CorruptCheckpoint, match="2 trained rows"):
        convert_base(base("llama"), tmp_path / "merged.gguf", merge=adapter_dir)


def test_reading_in_pieces_gives_the_same(base: Base, tmp_path: Path) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("gpt2"), target_modules=["c_attn", "wte"], use_dora=True)
    with SafetensorsCheckpoint(base("gpt2")) as checkpoint:
        values = read_config(base("gpt2"))
        merged = merge_adapter(checkpoint, adapter_dir, base_dir=base("gpt2"), values=values).checkpoint
        for name in ("transformer.h.0.attn.c_attn.weight", find_family(values).embedding_name):
            rows = merged.shape(name)[0]
            pieces = [merged.rows(name, start, min(rows, start + 100)) for start in range(0, rows, 100)]
            np.testing.assert_allclose(np.concatenate(pieces), load_float32(merged, name), atol=1e-6)
