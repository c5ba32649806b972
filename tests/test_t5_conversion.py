"""T5, Flan-T5, mT5 and UMT5 → GGUF: the decoder's distributions equal transformers', with and without an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import CorruptCheckpoint, UnsupportedAdapter, UnsupportedModel, convert_adapter, convert_base
from edgetune.gguf_header import read_gguf_header
from tests.adapters import write_adapter
from tests.checkpoints import edit_json
from tests.encoder_decoders import MODELS, llama_seq2seq_logits, torch_seq2seq_logits, write_t5
from tests.llama_logits import max_kl

SOURCE = [5, 17, 130, 44, 201, 9, 77, 211, 12, 150, 33, 18, 91, 140, 6, 180] * 11 + [1]
TARGET = [0, 12, 99, 5, 203, 41, 77, 18, 3, 160] * 15
"""Long enough for every bucket of distances."""
ATTENTION = ["q", "k", "v", "o"]
FEED_FORWARD = ["wi", "wi_0", "wi_1", "wo"]


def gguf_kl(model_dir: Path, gguf: Path, *, adapter_dir: Path | None = None, lora: Path | None = None) -> float:
    expected = torch_seq2seq_logits(model_dir, SOURCE, TARGET, adapter_dir=adapter_dir)
    found = llama_seq2seq_logits(gguf, SOURCE, TARGET, lora=lora)
    assert found.shape == expected.shape
    entropy = -(np.exp(_log_softmax(expected)) * _log_softmax(expected)).sum(axis=-1)
    assert entropy.mean() > 0.5, "the model only ever repeats its input"
    return max_kl(expected, found)


def _log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", MODELS)
def test_the_distributions_are_the_checkpoints(tmp_path: Path, name: str) -> None:
    model_dir = write_t5(tmp_path / "model", name)
    for outtype, bound in (("f32", 1e-5), ("f16", 1e-3)):
        out_path = tmp_path / f"{outtype}.gguf"
        convert_base(model_dir, out_path, outtype=outtype)
        assert gguf_kl(model_dir, out_path) < bound, outtype


def test_the_factor_before_the_head_counts(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "t5")
    edit_json(model_dir / "config.json", scale_decoder_outputs=False)
    convert_base(model_dir, tmp_path / "wrong.gguf", outtype="f32")
    edit_json(model_dir / "config.json", scale_decoder_outputs=True)
    assert gguf_kl(model_dir, tmp_path / "wrong.gguf") > 1


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
def test_what_config_json_says_of_the_factor(config: dict[str, Any], scaled: bool) -> None:
    from transformers import AutoConfig

    from converters.base import find_family

    values = {"architectures": ["T5ForConditionalGeneration"], "d_model": 64, **config}
    family: Any = find_family(values)
    assert (family.output_scale != 1.0) == scaled
    assert AutoConfig.for_model("t5", **config).scale_decoder_outputs == scaled


def test_keys_and_tensors(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "t5-uneven")
    edit_json(model_dir / "config.json", n_positions=777, decoder_start_token_id=None, pad_token_id=0)
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16")
    header = read_gguf_header(tmp_path / "model.gguf", arrays=True)
    assert header.architecture == "t5"
    assert {key: header.metadata[f"t5.{key}"] for key in ("block_count", "decoder_block_count", "context_length")} == {
        "block_count": 3,
        "decoder_block_count": 1,
        "context_length": 777,
    }
    assert header.metadata["t5.decoder_start_token_id"] == 0
    assert header.metadata["t5.attention.relative_buckets_count"] == 24
    assert header.metadata["edgetune.task"] == "seq2seq"
    assert json.loads(str(header.metadata["tokenizer.huggingface.json"]))["model"]["type"] == "Unigram"
    types = {tensor.name: tensor.type for tensor in header.tensors}
    assert types["enc.blk.0.ffn_down.weight"] == types["dec.blk.0.ffn_down.weight"] == "F32"
    assert types["enc.blk.0.attn_rel_b.weight"] == types["dec.output_norm.weight"] == "F32"
    assert types["dec.blk.0.cross_attn_q.weight"] == "F16"
    assert "output.weight" not in types


@pytest.mark.parametrize("gated", [True, False])
def test_values_beyond_float16_come_through(tmp_path: Path, gated: bool) -> None:
    """Before the feed-forward's last matrix, activations of trained models leave float16's range."""
    model_dir = write_t5(tmp_path / "model", "mt5" if gated else "t5")
    tensors = load_file(model_dir / "model.safetensors")
    grown = 1e3 if gated else 1e6
    for name, values in tensors.items():
        if ".wi" in name:
            tensors[name] = values * np.float32(grown)
        elif name.endswith(".wo.weight"):
            tensors[name] = values / np.float32(grown**2 if gated else grown)
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    adapter_dir = write_adapter(
        tmp_path / "adapter", model_dir, task_type="SEQ_2_SEQ_LM", target_modules=["wo"], strength=1e-6
    )
    convert_base(model_dir, tmp_path / "f16.gguf", outtype="f16")
    convert_adapter(adapter_dir, model_dir, tmp_path / "lora.gguf", outtype="f16")
    assert gguf_kl(model_dir, tmp_path / "f16.gguf") < 1e-3
    assert gguf_kl(model_dir, tmp_path / "f16.gguf", adapter_dir=adapter_dir, lora=tmp_path / "lora.gguf") < 1e-3


@pytest.mark.parametrize("name", ["t5", "flan-t5", "umt5"])
@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_checkpoints_in_16_bits(tmp_path: Path, name: str, outtype: str) -> None:
    model_dir = write_t5(tmp_path / "model", name, dtype="bfloat16")
    convert_base(model_dir, tmp_path / "model.gguf", outtype=outtype)
    assert gguf_kl(model_dir, tmp_path / "model.gguf") < (1e-3 if outtype == "f16" else 2e-2)


def test_other_names_of_the_embedding(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "flan-t5")
    tensors = load_file(model_dir / "model.safetensors")
    shared = tensors["shared.weight"]
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((32, 3), np.float32)}
    for more in (
        {"encoder.embed_tokens.weight": shared.copy(), "decoder.embed_tokens.weight": shared.copy(), **unused},
        {"shared.weight": None, "decoder.embed_tokens.weight": shared.copy()},
    ):
        changed = {name: values for name, values in {**tensors, **more}.items() if values is not None}
        save_file(changed, model_dir / "model.safetensors", metadata={"format": "pt"})
        convert_base(model_dir, tmp_path / "model.gguf", outtype="f32")
        assert gguf_kl(model_dir, tmp_path / "model.gguf") < 1e-5
    save_file({**tensors, "encoder.embed_tokens.weight": shared * 2}, model_dir / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"differs from its"):
        convert_base(model_dir, tmp_path / "model.gguf")


def test_a_missing_and_an_unknown_tensor(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "mt5")
    tensors = load_file(model_dir / "model.safetensors")
    gone = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    save_file({name: values for name, values in tensors.items() if name != gone}, model_dir / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="EncDecAttention"):
        convert_base(model_dir, tmp_path / "model.gguf")
    save_file({**tensors, "encoder.more.weight": np.ones(3, np.float32)}, model_dir / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"encoder\.more"):
        convert_base(model_dir, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance"),
        ({"relative_attention_num_buckets": 512}, "relative_attention_num_buckets"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu"}, "silu"),
        ({"num_layers": 2, "num_decoder_layers": 3}, "decoder has 3 layers"),
    ],
)
def test_what_the_graph_does_not_compute_is_refused(config: dict[str, Any], words: str) -> None:
    from converters.base import find_family

    with pytest.raises(UnsupportedModel, match=words):
        find_family({"architectures": ["T5ForConditionalGeneration"], **config})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("t5", {"target_modules": ["q", "v"]}),
        ("flan-t5", {"target_modules": [*ATTENTION, *FEED_FORWARD], "use_rslora": True}),
        ("flan-t5", {"target_modules": ["q", "lm_head"]}),
        ("umt5", {"target_modules": "all-linear", "rank_pattern": {"o": 4}, "alpha_pattern": {"wi_0": 3}}),
        ("t5-uneven", {"target_modules": r"decoder\..*EncDecAttention\.(q|k|v|o)"}),
        ("mt5", {"target_modules": r"encoder\..*\.(wi_1|wo|k)"}),
    ],
)
def test_adapters(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    model_dir = write_t5(tmp_path / "model", name)
    # T5's attention is not scaled: a strong change of its queries makes it all or nothing, and rounding decides.
    adapter_dir = write_adapter(tmp_path / "adapter", model_dir, task_type="SEQ_2_SEQ_LM", strength=0.1, **settings)
    base, lora, merged = (tmp_path / f"{part}.gguf" for part in ("base", "lora", "merged"))
    convert_base(model_dir, base, outtype="f32")
    convert_adapter(adapter_dir, model_dir, lora, outtype="f16")
    convert_base(model_dir, merged, outtype="f32", merge=adapter_dir)
    assert gguf_kl(model_dir, base, adapter_dir=adapter_dir) > 1e-2, "the adapter changes nothing"
    assert gguf_kl(model_dir, base, adapter_dir=adapter_dir, lora=lora) < 1e-3
    assert gguf_kl(model_dir, merged, adapter_dir=adapter_dir) < 1e-4


def test_an_adapter_on_a_tied_head_is_merged(tmp_path: Path) -> None:
    model_dir = write_t5(tmp_path / "model", "t5")
    adapter_dir = write_adapter(
        tmp_path / "adapter", model_dir, task_type="SEQ_2_SEQ_LM", target_modules=["q", "lm_head"]
    )
    with pytest.raises(UnsupportedAdapter, match="one tensor"):
        convert_adapter(adapter_dir, model_dir, tmp_path / "lora.gguf")
    convert_base(model_dir, tmp_path / "merged.gguf", outtype="f32", merge=adapter_dir)
    assert gguf_kl(model_dir, tmp_path / "merged.gguf", adapter_dir=adapter_dir) < 1e-4


@pytest.mark.parametrize("settings", [{"target_modules": ["q", "shared"]}, {"target_modules": ["q", "embed_tokens"]}])
def test_an_adapter_on_the_embedding_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    """PEFT adapts one of three modules that share the embedding; no file can say so."""
    model_dir = write_t5(tmp_path / "model", "flan-t5")
    adapter_dir = write_adapter(tmp_path / "adapter", model_dir, task_type="SEQ_2_SEQ_LM", **settings)
    with pytest.raises(UnsupportedAdapter, match="token embedding"):
        convert_adapter(adapter_dir, model_dir, tmp_path / "lora.gguf")
    with pytest.raises(UnsupportedAdapter, match="token embedding"):
        convert_base(model_dir, tmp_path / "merged.gguf", merge=adapter_dir)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model_dir, other = write_t5(tmp_path / "model", "flan-t5"), write_t5(tmp_path / "other", "t5")
    adapter_dir = write_adapter(tmp_path / "adapter", model_dir, task_type="SEQ_2_SEQ_LM", target_modules=["q"])
    with pytest.raises((UnsupportedAdapter, CorruptCheckpoint)):
        convert_adapter(adapter_dir, other, tmp_path / "lora.gguf")
