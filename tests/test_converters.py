"""One contract for every family: the GGUF file answers as the checkpoint does in torch, or there is no file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import ConverterError, CorruptCheckpoint, UnsupportedModel, convert_base
from converters.base import families
from tests.checkpoints import DECODERS, edit_json, write_checkpoint
from tests.llama_logits import llama_logits, max_kl, torch_logits

MAX_KL = 1e-3
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(12)],
    "long_factor": [2.0 + 0.5 * i for i in range(12)],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.75,
}
SHORT = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", {**SHORT, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {**SHORT, "head_dim": 64}),
    "llama-linear": ("llama", {**SHORT, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-yarn": ("llama", {**SHORT, "rope_parameters": YARN}),
    "llama-yarn-betas": (
        "llama",
        {**SHORT, "rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "llama-longrope": (
        "llama",
        {
            **SHORT,
            "rope_parameters": {
                **{key: value for key, value in LONGROPE.items() if key != "partial_rotary_factor"},
                "short_factor": [1.0 + 0.1 * i for i in range(16)],
                "long_factor": [2.0 + 0.5 * i for i in range(16)],
            },
        },
    ),
    "qwen2-yarn": ("qwen2", {**SHORT, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3-yarn": ("qwen3", {**SHORT, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "phi3-longrope": ("phi3", {**SHORT, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}),
    "phi3-tied": ("phi3", {**SHORT, "tie_word_embeddings": True}),
    "gemma2-window": ("gemma2", {**SHORT, "sliding_window": 32, "query_pre_attn_scalar": 100}),
    "gemma3-pattern": (
        "gemma3",
        {
            **SHORT,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 256,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2-inner": ("gpt2", {"n_inner": 320, "n_embd": 128, "n_head": 4}),
}
CASES = {**{name: (name, {}) for name in DECODERS}, **VARIANTS}


def ids_for(model_dir: Path, count: int = 300) -> list[int]:
    config = json.loads((model_dir / "config.json").read_text())
    return [int(one) for one in np.random.default_rng(0).integers(0, config["vocab_size"], count)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a case's checkpoint once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def write(case: str) -> Path:
        family, overrides = CASES[case]
        directory = root / case
        if not directory.is_dir():
            write_checkpoint(directory, family, overrides=overrides, dtype="bfloat16")
        return directory

    return write


@pytest.mark.parametrize("case", CASES)
def test_every_family_answers_as_in_torch(case: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir, out_path = checkpoint(case), tmp_path / "model.gguf"
    convert_base(model_dir, out_path, outtype="f16")
    ids = ids_for(model_dir)
    reference = torch_logits(model_dir, ids)
    assert spread(reference) > 0.05, "a distribution this peaked would let a broken converter pass"
    assert max_kl(reference, llama_logits(out_path, ids, n_ctx=512)) <= MAX_KL


def spread(logits: np.ndarray[Any, Any]) -> float:
    """Mean probability mass outside the likeliest token."""
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return float((1 - 1 / probabilities.sum(axis=-1)).mean())


def test_long_rope_takes_short_factors_in_a_short_context(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir, out_path = checkpoint("phi3-longrope"), tmp_path / "model.gguf"
    convert_base(model_dir, out_path, outtype="f32")
    ids = ids_for(model_dir, 100)
    assert max_kl(torch_logits(model_dir, ids), llama_logits(out_path, ids, n_ctx=256)) <= MAX_KL


@pytest.mark.parametrize(("outtype", "bound"), [("f32", 1e-5), ("bf16", 1e-3), ("q8_0", 0.05), ("auto", 1e-3)])
def test_output_types(outtype: str, bound: float, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model_dir, out_path = checkpoint("qwen2"), tmp_path / "model.gguf"
    convert_base(model_dir, out_path, outtype=outtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in read(out_path).tensors}
    assert types["blk.0.attn_q.weight"] == {"auto": "BF16"}.get(outtype, outtype.upper())
    assert types["blk.0.attn_norm.weight"] == "F32"
    ids = ids_for(model_dir, 64)
    assert max_kl(torch_logits(model_dir, ids), llama_logits(out_path, ids, n_ctx=256)) <= bound


def read(path: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: np.array(tensor.data) for tensor in read(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    return {key: value.contents() for key, value in read(path).fields.items()}


def test_shards_make_the_same_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole, sharded = checkpoint("llama"), tmp_path / "llama"
    write_checkpoint(sharded, "llama", dtype="bfloat16", max_shard_size="500KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    for index, model_dir in enumerate((whole, sharded)):
        convert_base(model_dir, tmp_path / f"{index}.gguf", outtype="f16")
    first, second = tensors(tmp_path / "0.gguf"), tensors(tmp_path / "1.gguf")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_value_beyond_float16_keeps_its_tensor_wide(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e30

    model_dir = edited(checkpoint("llama"), tmp_path, enlarge)
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16")
    types = {tensor.name: tensor.tensor_type.name for tensor in read(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "BF16"
    assert types["blk.0.ffn_up.weight"] == "F16"
    llama_logits(tmp_path / "model.gguf", [1, 2, 3], n_ctx=256)


def test_stacked_experts_make_the_same_file(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import torch

    def stack(tensors: dict[str, Any]) -> None:
        for layer in range(2):
            here = f"model.layers.{layer}.mlp.experts"
            parts = {
                kind: torch.stack([tensors.pop(f"{here}.{expert}.{kind}_proj.weight") for expert in range(4)])
                for kind in ("gate", "up", "down")
            }
            tensors[f"{here}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
            tensors[f"{here}.down_proj"] = parts["down"]

    source = checkpoint("qwen3-moe")
    convert_base(source, tmp_path / "apart.gguf", outtype="f16")
    convert_base(edited(source, tmp_path, stack), tmp_path / "stacked.gguf", outtype="f16")
    first, second = tensors(tmp_path / "apart.gguf"), tensors(tmp_path / "stacked.gguf")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def edited(source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the checkpoint `source` with its tensors changed."""
    import shutil

    from safetensors.torch import load_file, save_file

    model_dir = tmp_path / "edited"
    shutil.copytree(source, model_dir)
    tensors = load_file(model_dir / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model_dir / "model.safetensors")
    return model_dir


def test_a_tied_head_is_found_under_either_name(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    source = checkpoint("llama-tied")
    convert_base(source, tmp_path / "a.gguf", outtype="f16")
    convert_base(edited(source, tmp_path, rename), tmp_path / "b.gguf", outtype="f16")
    assert tensors(tmp_path / "a.gguf").keys() == tensors(tmp_path / "b.gguf").keys()
    assert "output.weight" not in tensors(tmp_path / "b.gguf")


def test_a_head_that_differs_from_its_embedding_is_kept_as_transformers_keeps_it(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def untie(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * -0.5

    model_dir = edited(checkpoint("llama-tied"), tmp_path, untie)
    convert_base(model_dir, tmp_path / "model.gguf", outtype="f16")
    ids = ids_for(model_dir, 50)
    assert max_kl(torch_logits(model_dir, ids), llama_logits(tmp_path / "model.gguf", ids, n_ctx=256)) <= MAX_KL


def test_old_spellings_of_the_config(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("llama3-rope"), tmp_path / "old")
    rope = json.loads((model_dir / "config.json").read_text())["rope_parameters"]
    edit_json(
        model_dir / "config.json",
        rope_parameters=None,
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=rope,
        dtype=None,
        torch_dtype="bfloat16",
        head_dim=None,
        tie_word_embeddings=None,
    )
    convert_base(model_dir, tmp_path / "old.gguf", outtype="f16")
    convert_base(checkpoint("llama3-rope"), tmp_path / "new.gguf", outtype="f16")
    old, new = metadata(tmp_path / "old.gguf"), metadata(tmp_path / "new.gguf")
    assert {**old, "general.name": ""} == {**new, "general.name": ""}
    assert np.array_equal(
        tensors(tmp_path / "old.gguf")["rope_freqs.weight"], tensors(tmp_path / "new.gguf")["rope_freqs.weight"]
    )


def test_metadata_progress_and_space(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sizes: list[int] = []
    out_path = tmp_path / "model.gguf"
    extra: dict[str, str | int | float | bool] = {"edgetune.base.name": "x", "a.int": 7, "a.float": 0.5, "a.bool": True}
    convert_base(
        checkpoint("llama"),
        out_path,
        outtype="f16",
        metadata=extra,
        on_tensor=lambda name, shape, done, total: seen.append((done, total)),
        check_space=sizes.append,
    )
    keys = metadata(out_path)
    assert {key: keys[key] for key in extra} == extra
    assert seen[-1][0] == seen[-1][1]
    assert sizes[0] == pytest.approx(out_path.stat().st_size, rel=0.05)


def test_a_directory_named_like_phi3_loads(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    # llama.cpp looks for "phi-3" in general.name, and cannot load another vocabulary under that name.
    convert_base(checkpoint("phi3"), tmp_path / "model.gguf", outtype="f16")
    assert "phi3" not in metadata(tmp_path / "model.gguf")["general.name"].lower()


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "norm_topk_prob": ("qwen3-moe", {"norm_topk_prob": False}),
    "mlp_only_layers": ("qwen3-moe", {"mlp_only_layers": [0]}),
    "decoder_sparse_step": ("qwen3-moe", {"decoder_sparse_step": 2}),
    "hidden_act": ("llama", {"hidden_act": "gelu"}),
    "rope_type": ("qwen2", {"rope_parameters": {**DECODERS["llama3-rope"][1]["rope_parameters"]}}),
    "beta_fast": ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 8.0}}),
    "partial_rotary_factor": ("llama", {"partial_rotary_factor": 0.5}),
    "sliding_window": ("mistral", {"sliding_window": 64}),
    "attention_bias": ("qwen3", {"attention_bias": True}),
    "head_dim": ("qwen2", {"head_dim": 64}),
    "attn_logit_softcapping": ("gemma2", {"attn_logit_softcapping": None}),
    "use_bidirectional_attention": ("gemma3", {"use_bidirectional_attention": True}),
    "hidden_activation": ("gemma3", {"hidden_activation": "gelu"}),
    "activation_function": ("gpt2", {"activation_function": "relu"}),
    "scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "quantization_config": ("llama", {"quantization_config": {"quant_method": "gptq"}}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_the_graph_cannot_honour_is_refused_by_name(
    field: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil

    case, changes = REFUSED[field]
    model_dir = shutil.copytree(checkpoint(case), tmp_path / "model")
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModel, match=field):
        convert_base(model_dir, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_long_window_ends_the_context(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("mistral"), tmp_path / "model")
    edit_json(model_dir / "config.json", sliding_window=4096, max_position_embeddings=32768)
    convert_base(model_dir, tmp_path / "model.gguf")
    assert metadata(tmp_path / "model.gguf")["llama.context_length"] == 4096


def drop(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = tensors["model.norm.weight"].clone()


def reshape(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [(drop, CorruptCheckpoint, "lacks"), (add, UnsupportedModel, "extra"), (reshape, CorruptCheckpoint, "255")],
)
def test_tensors_that_do_not_match(
    change: Callable[[dict[str, Any]], None],
    error: type[ConverterError],
    words: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    model_dir = edited(checkpoint("llama"), tmp_path, change)
    with pytest.raises(error, match=words) as caught:
        convert_base(model_dir, tmp_path / "model.gguf")
    assert caught.value.hint
    assert not (tmp_path / "model.gguf").exists()


def break_header(data: bytes, **changes: Any) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= changes
    packed = json.dumps(header).encode()
    return len(packed).to_bytes(8, "little") + packed + data[8 + length :]


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1000],
    "too long": lambda data: data + b"\0" * 8,
    "cut in the header": lambda data: data[:100],
    "header length lies": lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
    "not json": lambda data: (8).to_bytes(8, "little") + b"nonsense" + data[16:],
    "a list": lambda data: (2).to_bytes(8, "little") + b"[]" + data[10:],
    "overlap": lambda data: break_header(data, data_offsets=[0, 512]),
    "negative": lambda data: break_header(data, data_offsets=[-512, 0]),
    "wrong size": lambda data: break_header(data, shape=[3]),
    "null shape": lambda data: break_header(data, shape=None),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_weight_files(fault: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    path = model_dir / "model.safetensors"
    path.write_bytes(BROKEN[fault](path.read_bytes()))
    with pytest.raises(CorruptCheckpoint) as caught:
        convert_base(model_dir, tmp_path / "model.gguf")
    assert caught.value.hint


def test_an_eight_bit_checkpoint_is_named(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    path = model_dir / "model.safetensors"
    path.write_bytes(break_header(path.read_bytes(), dtype="F8_E4M3"))
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        convert_base(model_dir, tmp_path / "model.gguf")


@pytest.mark.parametrize("shard", ["gone.safetensors", "../model.safetensors", "/etc/passwd"])
def test_an_index_that_leads_astray(shard: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": shard}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="lacks the weight file"):
        convert_base(model_dir, tmp_path / "model.gguf")


def test_pickles_unknown_architectures_and_missing_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle"):
        convert_base(model_dir, tmp_path / "model.gguf")
    edit_json(model_dir / "config.json", architectures=["BartForConditionalGeneration"])
    with pytest.raises(UnsupportedModel, match="BartForConditionalGeneration"):
        convert_base(model_dir, tmp_path / "model.gguf")
    (model_dir / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        convert_base(model_dir, tmp_path / "model.gguf")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        convert_base(tmp_path, tmp_path / "model.gguf")


def test_the_weights_map_is_one_for_both_converters() -> None:
    family = families()["LlamaForCausalLM"]({**DECODERS["llama"][1], "vocab_size": 320})
    (target,) = family.map_weight("model.layers.1.self_attn.q_proj.weight")
    assert target.name == "blk.1.attn_q.weight"
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    a, b = (np.random.default_rng(1).standard_normal(shape).astype(np.float32) for shape in ((4, 256), (256, 4)))
    whole = weight + b @ a
    for operation in target.operations:
        whole, weight = operation.apply(whole), operation.apply(weight)
        a, b = operation.apply_lora(a, b)
    assert np.allclose(whole, weight + b @ a, atol=1e-5)
    with pytest.raises(UnsupportedModel):
        family.map_weight("model.layers.9.self_attn.q_proj.weight")


def test_importing_the_package_is_cheap() -> None:
    import subprocess
    import sys

    code = "import sys, converters; converters.convert_base; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
