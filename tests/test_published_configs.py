"""config.json as published models spell it (whole numbers for fractions, fields of older transformers), made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert_base
from tests.checkpoints import build_bpe_tokenizer, randomize
from tests.llama_logits import llama_logits, max_kl, torch_logits

_SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": [0, 1],
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}
_LONGROPE = {
    "long_factor": [1.0 + 0.7 * i for i in range(12)],
    "short_factor": [1 + 0.05 * i for i in range(12)],
    "type": "longrope",
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Gemma 3 1B": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 64,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "Phi-4 mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "full_attn_mod": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_scaling": _LONGROPE,
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "Llama 3.2 1B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "Qwen2.5 with YaRN": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"factor": 4, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000,
        "sliding_window": 131072,
        "use_sliding_window": False,
    },
}


def write_published(directory: Path, config: dict[str, Any]) -> Path:
    """A random checkpoint with `config` as its config.json, word for word."""
    import torch
    import transformers

    tokenizer = build_bpe_tokenizer()
    directory.mkdir()
    tokenizer.save_pretrained(directory)
    values = {"vocab_size": len(tokenizer), **_SMALL, **config}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    randomize(model)
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_answers_as_in_torch(name: str, tmp_path: Path) -> None:
    model_dir = write_published(tmp_path / "model", PUBLISHED[name])
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16")
    ids = [int(one) for one in np.random.default_rng(0).integers(0, 300, 100)]
    assert max_kl(torch_logits(model_dir, ids), llama_logits(tmp_path / "model.gguf", ids, n_ctx=256)) <= 1e-3
