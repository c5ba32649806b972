"""PEFT adapter → GGUF adapter: llama.cpp computes what PEFT computes, or the adapter is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import CorruptCheckpoint, UnsupportedAdapter, convert_adapter, convert_base
from edgetune.gguf_header import read_gguf_header
from tests.adapters import IDS, gguf_logits, peft_logits, write_adapter
from tests.checkpoints import edit_json, write_checkpoint
from tests.llama_logits import max_kl

Base = Callable[[str], Path]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 16},
    "alpha_pattern": {"k_proj": 64, r".*\.1\..*down_proj": 2},
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama plain": ("llama", {"target_modules": ["q_proj"]}),
    "llama rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "llama patterns": ("llama", {"target_modules": [*ATTENTION, "down_proj"], **PATTERNS}),
    "llama patterns rslora": ("llama", {"target_modules": [*ATTENTION, "down_proj"], **PATTERNS, "use_rslora": True}),
    "llama regex": ("llama", {"target_modules": r".*layers\.1\.(self_attn\.[kv]|mlp\.(gate|up))_proj"}),
    "llama one layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "llama exclude": ("llama", {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
    "llama embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "llama head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "llama both": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 4}}),
    "llama biases that are not there": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "llama tied": ("llama-tied", {"target_modules": "all-linear"}),
    "mistral": ("mistral", {"target_modules": "all-linear"}),
    "qwen2 patterns": ("qwen2", {"target_modules": [*ATTENTION, "down_proj"], **PATTERNS}),
    "qwen2 both": ("qwen2", {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "qwen3": ("qwen3", {"target_modules": "all-linear"}),
    "phi3": ("phi3", {"target_modules": "all-linear"}),
    "phi3 patterns": (
        "phi3",
        {
            "target_modules": ["qkv_proj", "gate_up_proj"],
            "rank_pattern": {"qkv_proj": 4},
            "alpha_pattern": {"gate_up_proj": 5},
        },
    ),
    "phi3 both": ("phi3", {"target_modules": ["embed_tokens", "lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 without the flag": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": False}),
    "gemma2": ("gemma2", {"target_modules": "all-linear"}),
    "gemma3": ("gemma3", {"target_modules": "all-linear", "use_rslora": True}),
    "mixtral attention": ("mixtral", {"target_modules": ATTENTION}),
    "qwen3-moe experts": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3-moe one parameter": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:], "alpha_pattern": {"down_proj": 3}},
    ),
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A checkpoint of a family, with its GGUF (`base.gguf`) inside; made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp(family) / "tiny"
            write_checkpoint(directory, family)
            convert_base(directory, directory / "base.gguf", outtype="f16")
            made[family] = directory
        return made[family]

    return make


@pytest.fixture(scope="module")
def llama_adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter to damage copies of."""
    return write_adapter(
        tmp_path_factory.mktemp("adapter") / "good", base("llama"), target_modules=["q_proj", "up_proj"]
    )


@pytest.fixture
def adapter(llama_adapter: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))


def tensors_of(adapter_dir: Path) -> dict[str, Any]:
    return dict(load_file(adapter_dir / "adapter_model.safetensors"))


def save(adapter_dir: Path, tensors: dict[str, Any]) -> None:
    save_file(tensors, adapter_dir / "adapter_model.safetensors")


@pytest.mark.parametrize("case", EXACT)
def test_computes_what_peft_computes(base: Base, tmp_path: Path, case: str) -> None:
    family, settings = EXACT[case]
    adapter_dir = write_adapter(tmp_path / "adapter", base(family), **settings)
    convert_adapter(adapter_dir, base(family), tmp_path / "adapter.gguf")
    expected = peft_logits(base(family), adapter_dir)
    assert max_kl(peft_logits(base(family), None), expected) > 0.1, "the adapter has to matter"
    assert max_kl(expected, gguf_logits(base(family) / "base.gguf", tmp_path / "adapter.gguf")) < 1e-3


@pytest.mark.parametrize(("outtype", "bound"), [("f32", 1e-4), ("f16", 1e-4), ("bf16", 1e-2), ("q8_0", 1e-2)])
def test_types(base: Base, tmp_path: Path, outtype: str, bound: float) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama"), target_modules="all-linear", r=32, lora_alpha=64)
    convert_adapter(adapter_dir, base("llama"), tmp_path / "adapter.gguf", outtype=outtype)
    types = {tensor.type for tensor in read_gguf_header(tmp_path / "adapter.gguf").tensors}
    assert types == {outtype.upper()}
    found = gguf_logits(base("llama") / "base.gguf", tmp_path / "adapter.gguf")
    assert max_kl(peft_logits(base("llama"), adapter_dir), found) < bound


def test_old_names_of_single_experts(base: Base, tmp_path: Path) -> None:
    """An adapter from before transformers stacked the experts; some experts have none."""
    adapter_dir = write_adapter(tmp_path / "adapter", base("mixtral"), target_modules=["q_proj"])
    generator = np.random.default_rng(0)
    tensors = tensors_of(adapter_dir)
    for layer in range(2):
        for expert in range(4):
            for name, inputs, outputs in (("w1", 256, 512), ("w2", 512, 256), ("w3", 256, 512)):
                prefix = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = generator.normal(0, inputs**-0.5, (8, inputs)).astype(np.float32)
                tensors[f"{prefix}.lora_B.weight"] = generator.normal(0, 0.1, (outputs, 8)).astype(np.float32)
    save(adapter_dir, tensors)
    edit_json(adapter_dir / "adapter_config.json", target_modules=["q_proj", "w1", "w2", "w3"])
    convert_adapter(adapter_dir, base("mixtral"), tmp_path / "adapter.gguf")
    expected = peft_logits(base("mixtral"), adapter_dir)
    assert max_kl(expected, gguf_logits(base("mixtral") / "base.gguf", tmp_path / "adapter.gguf")) < 1e-3


def test_metadata_and_alpha(base: Base, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(adapter, base("llama"), tmp_path / "plain.gguf", metadata={"edgetune.base.name": "tiny"})
    header = read_gguf_header(tmp_path / "plain.gguf")
    wanted = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "edgetune.base.name": "tiny",
    }
    assert wanted.items() <= dict(header.metadata).items()
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    assert shapes["blk.0.ffn_up.weight.lora_a"] in ((256, 8), (8, 256))


def test_differing_scales_are_folded_into_b(base: Base, adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / "adapter_config.json", alpha_pattern={"up_proj": 4})
    convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf", outtype="f32")
    assert read_gguf_header(tmp_path / "adapter.gguf").metadata["adapter.lora.alpha"] == 0.0


def test_alpha_zero_means_no_change(base: Base, adapter: Path, tmp_path: Path) -> None:
    """llama.cpp reads an alpha of 0 as "no scaling"; PEFT multiplies by it."""
    edit_json(adapter / "adapter_config.json", lora_alpha=0)
    convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")
    found = gguf_logits(base("llama") / "base.gguf", tmp_path / "adapter.gguf")
    assert np.array_equal(found, gguf_logits(base("llama") / "base.gguf"))


@pytest.mark.parametrize("factor", [1e-7, 1e6])
def test_values_that_float16_cannot_hold_stay_in_float32(
    base: Base, adapter: Path, tmp_path: Path, factor: float
) -> None:
    tensors = {name: value * factor if "lora_B" in name else value for name, value in tensors_of(adapter).items()}
    save(adapter, tensors)
    edit_json(adapter / "adapter_config.json", lora_alpha=16 / factor)
    convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")
    types = {tensor.name[-6:]: tensor.type for tensor in read_gguf_header(tmp_path / "adapter.gguf").tensors}
    assert types == {"lora_a": "F16", "lora_b": "F32"}
    expected = peft_logits(base("llama"), adapter)
    assert max_kl(expected, gguf_logits(base("llama") / "base.gguf", tmp_path / "adapter.gguf")) < 1e-3


def test_names_without_prefix_are_read(base: Base, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(adapter, base("llama"), tmp_path / "one.gguf")
    save(adapter, {name.removeprefix("base_model.model."): value for name, value in tensors_of(adapter).items()})
    convert_adapter(adapter, base("llama"), tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
    "saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "saved norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "modules_to_save"),
    "token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}, "trainable_token_ind"),
    "lora bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
    "trained biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, "bias"),
    "larger vocabulary": ("llama", {"target_modules": ["q_proj"], "resize": 384}, "vocabulary"),
    "tied embedding": ("llama-tied", {"target_modules": ["embed_tokens"]}, "one tensor"),
    "tied head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}, "one tensor"),
    "tied embedding of gpt2": ("gpt2", {"target_modules": ["wte"]}, "one tensor"),
    "positions": ("gpt2", {"target_modules": ["wpe"]}, "without looking at adapters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_hold_is_refused_and_the_way_out_is_named(base: Base, tmp_path: Path, case: str) -> None:
    family, settings, reason = REFUSED[case]
    adapter_dir = write_adapter(tmp_path / "adapter", base(family), **settings)
    with pytest.raises(UnsupportedAdapter, match=reason) as caught:
        convert_adapter(adapter_dir, base(family), tmp_path / "adapter.gguf")
    assert "--merge" in caught.value.hint
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "LOHA"),
        ("peft_type", "PREFIX_TUNING"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"r": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("megatron_config", {"a": 1}),
        ("use_something_new", True),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(
    base: Base, adapter: Path, tmp_path: Path, field: str, value: object
) -> None:
    edit_json(adapter / "adapter_config.json", **{field: value})
    with pytest.raises(UnsupportedAdapter, match=field) as caught:
        convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", False),
        ("lora_dropout", 0.5),
    ],
)
def test_fields_that_only_steer_training_change_nothing(
    base: Base, adapter: Path, tmp_path: Path, field: str, value: object
) -> None:
    convert_adapter(adapter, base("llama"), tmp_path / "one.gguf")
    edit_json(adapter / "adapter_config.json", **{field: value})
    convert_adapter(adapter, base("llama"), tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def _drop(*endings: str) -> Callable[[Path], None]:
    def change(adapter_dir: Path) -> None:
        save(
            adapter_dir, {name: value for name, value in tensors_of(adapter_dir).items() if not name.endswith(endings)}
        )

    return change


def _add(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    def change(adapter_dir: Path) -> None:
        save(adapter_dir, {**tensors_of(adapter_dir), name: np.ones(shape, np.float32)})

    return change


def _configure(**changes: Any) -> Callable[[Path], None]:
    return lambda adapter_dir: edit_json(adapter_dir / "adapter_config.json", **changes)


def _truncate(adapter_dir: Path) -> None:
    path = adapter_dir / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    def change(adapter_dir: Path) -> None:
        (adapter_dir / name).write_bytes(data)

    return change


def _undefined(adapter_dir: Path) -> None:
    tensors = tensors_of(adapter_dir)
    next(iter(tensors.values()))[0, 0] = np.nan
    save(adapter_dir, tensors)


LAYER = "base_model.model.model.layers.0."
DAMAGED: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "half a pair": (_drop("0.self_attn.q_proj.lora_A.weight"), CorruptCheckpoint, "lacks lora_A"),
    "a dropped pair": (
        _drop("1.mlp.up_proj.lora_A.weight", "1.mlp.up_proj.lora_B.weight"),
        CorruptCheckpoint,
        "holds nothing for 'model.layers.1.mlp.up_proj'",
    ),
    "an unknown tensor": (_add(LAYER + "mlp.magic.weight", (2, 2)), UnsupportedAdapter, "no place"),
    "a layer too many": (_add("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", (8, 256)), Exception, "7"),
    "an adapter's name": (_add(LAYER + "self_attn.q_proj.lora_A.default.weight", (8, 256)), UnsupportedAdapter, "def"),
    "an untargeted pair": (
        lambda path: (_add(LAYER + "mlp.gate_proj.lora_A.weight", (8, 256))(path),
                      _add(LAYER + "mlp.gate_proj.lora_B.weight", (512, 8))(path), None)[-1],
        UnsupportedAdapter,
        "leaves out",
    ),
    "another rank": (_configure(r=16), CorruptCheckpoint, "rank 8"),
    "a rank of zero": (_configure(r=0), CorruptCheckpoint, "rank"),
    "an alpha that is text": (_configure(lora_alpha="16"), CorruptCheckpoint, "lora_alpha"),
    "a broken pattern": (_configure(rank_pattern={"(": 4}), CorruptCheckpoint, "pattern"),
    "a truncated file": (_truncate, CorruptCheckpoint, "safetensors|truncated"),
    "an empty file": (_write("adapter_model.safetensors", b""), CorruptCheckpoint, "safetensors"),
    "a lying header": (
        _write("adapter_model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"), CorruptCheckpoint, "safetensors",
    ),
    "no number": (_undefined, CorruptCheckpoint, "undefined"),
    "a broken configuration": (_write("adapter_config.json", b"{"), CorruptCheckpoint, "JSON"),
    "a configuration that is a list": (_write("adapter_config.json", b"[]"), CorruptCheckpoint, "object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters_are_errors(base: Base, adapter: Path, tmp_path: Path, case: str) -> None:
    damage, error, reason = DAMAGED[case]
    damage(adapter)
    with pytest.raises(error, match=reason):
        convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")


def test_a_pickle_is_refused(base: Base, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapter, match="pickle"):
        convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")


def test_another_base_is_refused(base: Base, adapter: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "wider", "llama", overrides={"intermediate_size": 768})
    with pytest.raises(UnsupportedAdapter, match=r"512 x 256.*768 x 256"):
        convert_adapter(adapter, tmp_path / "wider", tmp_path / "adapter.gguf")
    with pytest.raises(UnsupportedAdapter, match="no place"):
        convert_adapter(adapter, base("gpt2"), tmp_path / "adapter.gguf")


def test_disk_space_is_asked_for_before_writing(base: Base, adapter: Path, tmp_path: Path) -> None:
    class NoRoom(Exception):
        pass

    def check(needed: int) -> None:
        raise NoRoom(needed)

    with pytest.raises(NoRoom) as caught:
        convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf", check_space=check)
    assert not (tmp_path / "adapter.gguf").exists()
    convert_adapter(adapter, base("llama"), tmp_path / "adapter.gguf")
    assert abs(caught.value.args[0] - (tmp_path / "adapter.gguf").stat().st_size) < 2000


def test_saved_embeddings_that_were_not_trained_do_not_matter(base: Base, tmp_path: Path) -> None:
    adapter_dir = write_adapter(tmp_path / "adapter", base("llama"), target_modules=["embed_tokens"])
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors_of(adapter_dir)
    convert_adapter(adapter_dir, base("llama"), tmp_path / "adapter.gguf")
    names = {tensor.name for tensor in read_gguf_header(tmp_path / "adapter.gguf").tensors}
    assert names == {"token_embd.weight.lora_a", "token_embd.weight.lora_b"}


def test_patterns_match_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    from converters.adapter_config import AdapterConfig

    modules = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj", "lm_head", "model.layers.1.mlp.q_proj"]
    patterns = ["q_proj", "0.self_attn.q_proj", "proj", ".*mlp.*", "layers.1.*", "lm_head", "^model.*", "head"]
    for pattern in patterns:
        config = AdapterConfig({"r": 8, "rank_pattern": {pattern: 3}})
        for module in modules:
            matched = get_pattern_key([pattern], module) == pattern
            assert config.rank(module) == (3 if matched else 8), (pattern, module)


def test_targets_match_as_in_peft() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    from converters.adapter_config import AdapterConfig

    modules = [f"model.layers.{n}.{name}" for n in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp")]
    modules += ["lm_head", "model.embed_tokens", "q_proj", "model.norm"]
    settings: list[dict[str, Any]] = [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*\.1\..*proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ]
    for values in settings:
        theirs, ours = LoraConfig(**values), AdapterConfig(values)
        for module in modules:
            expected = check_target_module_exists(theirs, module)
            wanted = bool(expected) and type(expected).__name__ != "_ExcludedModule"
            assert ours.targets(module) == wanted, (values, module)


def test_ids_are_inside_the_vocabulary(base: Base) -> None:
    assert max(IDS) < json.loads((base("llama") / "config.json").read_text())["vocab_size"]
