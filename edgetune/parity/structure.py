"""Vocabulary, metadata, tensors and fingerprints of the GGUF against the checkpoint's config; loads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgetune.artifacts import Fingerprint, ParityCheck
from edgetune.errors import EdgetuneError
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import GgufHeader
from edgetune.library import check_pair_headers, read_config
from edgetune.text_limit import unused_positions

_SAME_NUMBERS = {
    "block_count": ("num_hidden_layers", "n_layer", "num_layers"),
    "decoder_block_count": ("num_decoder_layers", "num_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads"),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "rope.freq_base": ("rope_theta",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
"""GGUF key after the architecture → the config fields that say the same."""


def check_structure(
    header: GgufHeader, base_dir: Path, *, lora: GgufHeader | None = None, merged: bool = False
) -> ParityCheck:
    """Compare what both sides say about themselves: numbers, vocabulary, layers, fingerprints, the adapter's fit."""
    findings = list(_findings(header, base_dir, lora, merged))
    problems = [problem for problem in findings if problem]
    return ParityCheck("structure", len(findings), len(findings) - len(problems), "".join(problems[:1]))


def text_config(base_dir: Path) -> dict[str, Any]:
    """config.json of the language model: the part for text where there are several, rope settings on the top level."""
    config = read_config(base_dir)
    inner = config.get("text_config")
    values = {**config, **inner} if isinstance(inner, dict) else dict(config)
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        values = {**rope, **{key: value for key, value in values.items() if value is not None}}
    return values


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether the model routes tokens to experts."""
    return any(isinstance(config.get(name), int) and config[name] > 1 for name in ("num_local_experts", "num_experts"))


def _findings(header: GgufHeader, base_dir: Path, lora: GgufHeader | None, merged: bool) -> Iterator[str]:
    config = text_config(base_dir)
    for key, names in _SAME_NUMBERS.items():
        expected = next((config[name] for name in names if isinstance(config.get(name), int | float)), None)
        found = header.metadata.get(f"{header.architecture}.{key}")
        if expected is not None and isinstance(found, int | float):
            if key == "context_length":
                expected -= unused_positions(config)
            same = abs(found - expected) <= 1e-6 * abs(expected)
            yield "" if same else f"{key} is {found:g} in {header.path.name} and {expected:g} in config.json"
    yield _vocabulary(header)
    yield _layers(header)
    known = _fingerprint(base_dir)
    if not merged:
        yield _same_base(Fingerprint.from_metadata(header.metadata), known, header.path, base_dir)
    if lora is not None:
        yield _same_base(Fingerprint.from_metadata(lora.metadata), known, lora.path, base_dir)
        try:
            check_pair_headers(header, lora)
            yield ""
        except EdgetuneError as error:
            yield error.message


def _vocabulary(header: GgufHeader) -> str:
    tokens = header.array_length("tokenizer.ggml.tokens")
    embedding = next((tensor.shape for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if tokens is None or embedding is None:
        return f"{header.path.name} has no {'vocabulary' if tokens is None else 'token embedding'}"
    if embedding[-1] != tokens:
        return f"the vocabulary has {tokens} entries and the embedding {embedding[-1]} rows"
    return ""


def _layers(header: GgufHeader) -> str:
    """Every layer that the header counts must be there, of the encoder and of the decoder where there are both."""
    layers: dict[str, set[int]] = {}
    for tensor in header.tensors:
        if match := re.fullmatch(r"((?:enc\.|dec\.)?blk)\.(\d+)\..+", tensor.name):
            layers.setdefault(match[1], set()).add(int(match[2]))
    for stack, found in layers.items() or {"blk": set[int]()}.items():
        counted = header.number("block_count")
        if stack == "dec.blk":
            counted = header.number("decoder_block_count") or counted
        if counted is not None and sorted(found) != list(range(counted)):
            return f"{header.path.name} holds the layers {sorted(found)} of {counted}"
    return ""


def _fingerprint(base_dir: Path) -> Fingerprint:
    return fingerprint_checkpoint(base_dir)


def _same_base(recorded: Fingerprint, actual: Fingerprint, path: Path, base_dir: Path) -> str:
    # The template is compared as text by its own check, and an adapter may bring another one.
    differing = [part for part in recorded.differences(actual) if part != "template"]
    return f"{path.name} was made from another base than {base_dir}: {', '.join(differing)} differ" if differing else ""
