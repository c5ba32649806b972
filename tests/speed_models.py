"""Small models with filled LoRA, some sequences, and their loss and gradients in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune.data import Tokenized
from edgetune.events import Event
from edgetune.training import TrainSettings
from edgetune.training.packing import PackedBatch, collate_packed
from tests.checkpoints import randomize

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SQUARE = {**SHAPE, "num_key_value_heads": 4}
CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen2": ("Qwen2Config", SHAPE),
    "qwen2-tied": ("Qwen2Config", {**SHAPE, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config", {**SHAPE, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": None}),
    "mistral-window": ("MistralConfig", {**SHAPE, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", {**SHAPE, **CAPPED, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi3": ("Phi3Config", SHAPE),
    "phi3-window": ("Phi3Config", {**SHAPE, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "granite": ("GraniteConfig", {**SHAPE, "logits_scaling": 3.0, "attention_multiplier": 0.2}),
    "cohere": ("CohereConfig", {**SQUARE, "logit_scale": 0.25}),
    "gpt-neox": ("GPTNeoXConfig", SQUARE),
    "olmo2": ("Olmo2Config", SHAPE),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}  # fmt: skip
"""Families that are packed: name → (transformers config class, settings)."""


def base_model(config_class: str, values: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    return model.requires_grad_(False)


def adapted_model(config_class: str, values: dict[str, Any], **lora: Any) -> Any:
    """A base with a LoRA adapter that changes what it says."""
    import peft
    import torch

    base = base_model(config_class, values)
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.train()


def sequences(count: int = 6) -> list[Tokenized]:
    random = np.random.default_rng(0)
    lengths = random.integers(3, 30, count)
    return [
        Tokenized(random.integers(1, 97, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in lengths
    ]


def plain_loss(model: Any, rows: list[Tokenized]) -> Any:
    """Sequence by sequence, through the model's own logits."""
    import torch

    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        wanted = torch.from_numpy(row.learned[1:])
        total = total + torch.nn.functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum")
    return total


def gradients(model: Any) -> dict[str, Any]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def speed_up(model: Any, rows: list[Tokenized], *, told: list[Event] | None = None, **settings: Any) -> Any:
    import torch

    from edgetune.training.speed import speed_up as start
    from edgetune.training.tasks.causal import CausalTask

    return start(
        model,
        TrainSettings(**settings),
        CausalTask("chat"),
        lengths=[len(row.ids) for row in rows],
        max_length=64,
        device=torch.device("cpu"),
        sink=(told if told is not None else []).append,
    )


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], *, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).norm() <= tolerance * wanted.norm() + 1e-7, name


def packed_in_one(model: Any, rows: list[Tokenized]) -> PackedBatch:
    import torch

    assert speed_up(model, rows)
    return collate_packed(rows, torch.device("cpu"))
