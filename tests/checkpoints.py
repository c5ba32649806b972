"""Small random-weight checkpoints of every decoder family, saved by transformers, at the scale of trained weights.

Random weights need std 1/sqrt(fan_in) and embeddings near 0.25, else every distribution is flat and a broken converter
passes. Sizes use grouped-query attention and, by default, rows that fit K-quants (multiples of 256).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "llama-tied": ("LlamaConfig", {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaConfig",
        {
            **_LLAMA_LIKE,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "head_dim": 64, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 64}),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "pad_token_id": 0}),
    "gemma2": (
        "Gemma2Config",
        {**_LLAMA_LIKE, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_LLAMA_LIKE, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True, "sliding_window": 64},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
        },
    ),
}
"""Name → (transformers config class, settings besides the vocabulary)."""


def write_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    overrides: Mapping[str, Any] | None = None,
    chat_template: str | None = CHATML,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a random checkpoint of `family` (a key of `DECODERS`) with a byte-level BPE tokenizer."""
    import torch
    import transformers

    config_class, settings = DECODERS[family]
    tokenizer = build_bpe_tokenizer(chat_template=chat_template)
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            **settings,
            **(overrides or {}),
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed=seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    return directory


def randomize(model: Any, *, seed: int = 0) -> None:
    """Give every parameter the scale of a trained one: matrices 1/sqrt(fan_in), embeddings 0.25, norms about 1.

    Gemma multiplies its embeddings by sqrt(hidden size): at 0.25 a tied head would only ever repeat its input.
    """
    import torch

    is_gemma = type(model).__name__.startswith("Gemma")
    embedding_scale = 0.05 if is_gemma else 0.25
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            name = name.lower()
            if parameter.ndim >= 2 and ("embed" in name or "wte" in name or "wpe" in name):
                parameter.copy_(noise * embedding_scale)
            elif parameter.ndim >= 2:
                fan_in = parameter.shape[0] if type(model).__name__.startswith("GPT2") else parameter.shape[-1]
                parameter.copy_(noise * fan_in**-0.5)
            elif "norm" in name or "ln_" in name:
                gain = 0.0 if is_gemma else 1.0
                parameter.copy_((gain if name.endswith("weight") else 0.0) + noise * 0.1)
            else:
                parameter.copy_(noise * 0.1)


@lru_cache
def _bpe_json() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = (
        "the of and to in is was that for it with as his on be at by this had not are but from or have an they which "
    )
    text = [
        words * 4,
        "The quick brown fox jumps over the lazy dog. 0123456789 hello world, café naïve 東京 🙂\n\n  x = f(y)\n",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=509, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(text * 20, trainer)
    return str(tokenizer.to_str())


def build_bpe_tokenizer(*, chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer (Qwen2's split) with <|endoftext|>, <|im_start|>, <|im_end|>; about 500 entries."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level fields of a JSON file; a value of None removes the field."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values), encoding="utf-8")
