"""What attention and MLP add in every block: as hooks on the modules say, and as llama.cpp's graph says."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_anatomy import find_blocks
from edgetune.explain.checkpoint_parts import Watch
from edgetune.explain.checkpoint_run import explain_checkpoint
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import StackRun
from edgetune.explain.words import percent
from edgetune.export import export_adapter, export_base
from tests.adapters import write_adapter
from tests.checkpoints import DECODERS, randomize
from tests.encoders import ENCODERS, LABELS, write_encoder
from tests.ggufs import base_gguf, checkpoint
from tests.seq2seq_checkpoints import write_seq2seq

TEXT = "the quick brown fox jumps"
GREEDY = Sampling(temp=0.0, seed=1)
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "pad_token_id": 0,
}  # fmt: skip

Call = tuple[Any, Any]
"""What a module got first, and what it gave first."""


class Calls:
    """What modules of a model got and gave, by name, as hooks see it."""

    def __init__(self, model: Any) -> None:
        self.of: dict[str, Call] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._keep, name), with_kwargs=True)

    def _keep(self, name: str, _module: Any, inputs: tuple[Any, ...], known: dict[str, Any], output: Any) -> None:
        got, gave = inputs[0] if inputs else known.get("hidden_states"), output
        gave = gave[0] if isinstance(gave, tuple) else gave
        # Falcon adds in place.
        self.of[name] = (got, gave.clone() if hasattr(gave, "clone") else gave)

    def share(self, added: Any, before: Any) -> float:
        return float((added.norm(dim=-1) / before.norm(dim=-1)).mean())


def pre_norm(calls: Calls, block: str, attention: str, mlp: str) -> tuple[float, float]:
    """Of a block that adds both outputs as they are, one after the other."""
    before, attended, added = calls.of[block][0], calls.of[f"{block}.{attention}"][1], calls.of[f"{block}.{mlp}"][1]
    return calls.share(attended, before), calls.share(added, before + attended)


def side_by_side(calls: Calls, block: str, attention: str, mlp: str) -> tuple[float, float]:
    before = calls.of[block][0]
    return tuple(calls.share(calls.of[f"{block}.{name}"][1], before) for name in (attention, mlp))  # type: ignore[return-value]


def post_norm(calls: Calls, block: str, attention: str, mlp: str, middle: str) -> tuple[float, float]:
    """Of a block with a norm after each addition; `middle` is the first of them."""
    before, attended, added = calls.of[block][0], calls.of[f"{block}.{attention}"][1], calls.of[f"{block}.{mlp}"][1]
    return calls.share(attended, before), calls.share(added, calls.of[f"{block}.{middle}"][1])


Expected = Callable[[Calls, str], tuple[float, float]]
BUILT: dict[str, tuple[str, dict[str, Any], str, Expected]] = {
    "Phi": ("AutoModelForCausalLM", {}, "model.layers.{}", lambda c, b: side_by_side(c, b, "self_attn", "mlp")),
    "GPTNeoX": ("AutoModelForCausalLM", {}, "gpt_neox.layers.{}", lambda c, b: side_by_side(c, b, "attention", "mlp")),
    "Falcon": (
        "AutoModelForCausalLM", {"parallel_attn": True}, "transformer.h.{}",
        lambda c, b: side_by_side(c, b, "self_attention", "mlp"),
    ),
    "Cohere": ("AutoModelForCausalLM", {}, "model.layers.{}", lambda c, b: pre_norm(c, b, "self_attn", "mlp")),
    "Olmo2": (
        "AutoModelForCausalLM", {}, "model.layers.{}",
        lambda c, b: pre_norm(c, b, "post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "OPT": (
        "AutoModelForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "model.decoder.layers.{}",
        lambda c, b: pre_norm(c, b, "self_attn", "fc2"),
    ),
    "GPT2": ("AutoModelForCausalLM", {"n_inner": 96}, "transformer.h.{}", lambda c, b: pre_norm(c, b, "attn", "mlp")),
    "Bert": (
        "AutoModelForMaskedLM", {}, "bert.encoder.layer.{}",
        lambda c, b: post_norm(c, b, "attention.output.dense", "output.dense", "attention"),
    ),
    "DistilBert": (
        "AutoModelForMaskedLM", {"hidden_dim": 96}, "distilbert.transformer.layer.{}",
        lambda c, b: post_norm(c, b, "attention", "ffn", "sa_layer_norm"),
    ),
    "Deberta": (
        "AutoModelForMaskedLM", {}, "deberta.encoder.layer.{}",
        lambda c, b: post_norm(c, b, "attention.output.dense", "output.dense", "attention"),
    ),
    "ModernBert": (
        "AutoModelForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}, "model.layers.{}",
        lambda c, b: pre_norm(c, b, "attn", "mlp"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BUILT))
def test_what_parts_add_is_what_the_modules_gave(name: str) -> None:
    import torch
    import transformers

    auto, changes, pattern, expected = BUILT[name]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    model = getattr(transformers, auto).from_config(config, attn_implementation="eager").eval()
    randomize(model)
    calls, watch = Calls(model), Watch(find_blocks(model))
    with torch.inference_mode(), watch.on():
        model(input_ids=torch.arange(3, 20)[None])
    assert len(watch.added) == SIZES["num_hidden_layers"]
    for layer, added in enumerate(watch.added):
        assert added is not None
        assert (added.attention, added.mlp) == pytest.approx(expected(calls, pattern.format(layer)), rel=1e-4)
        assert added.cross is None
        assert added.is_normed == (name in ("Bert", "DistilBert", "Deberta"))


NEITHER: dict[str, dict[str, Any]] = {
    "Mamba": {},
    "FalconH1": {"num_key_value_heads": 4},
    "XLM": {"n_layers": 2, "n_heads": 4, "emb_dim": 64},
}


@pytest.mark.parametrize("name", sorted(NEITHER))
def test_a_block_that_is_not_attention_and_mlp_says_nothing(name: str) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **NEITHER[name]})
    model = transformers.AutoModel.from_config(config).eval()
    watch = Watch(find_blocks(model))
    with torch.inference_mode(), watch.on():
        model(input_ids=torch.arange(3, 20)[None])
    assert watch.added
    assert not any(watch.added)


def same_shares(mine: StackRun, other: StackRun) -> None:
    for block, expected in zip(mine.blocks, other.blocks, strict=True):
        assert block.attention_share
        assert block.attention_share == pytest.approx(expected.attention_share, rel=2e-2)
        assert block.cross_share == (expected.cross_share and pytest.approx(expected.cross_share, rel=2e-2))
        assert block.mlp_share == pytest.approx(expected.mlp_share, rel=2e-2)
        assert block.is_normed == expected.is_normed


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_a_decoders_parts_add_in_torch_what_they_add_in_llama_cpp(family: str) -> None:
    torch = explain_checkpoint(checkpoint(family), TEXT, sampling=GREEDY, steps=0)
    llama = explain_gguf(base_gguf(family), TEXT, sampling=GREEDY, steps=0)
    same_shares(torch.runs[0].stacks[0], llama.runs[0].stacks[0])


def test_a_state_without_a_name_is_put_together_of_several_batches() -> None:
    text = "the lazy dog and the quick fox " * 12
    torch = explain_checkpoint(checkpoint("phi3"), text, sampling=GREEDY, steps=0)
    llama = explain_gguf(base_gguf("phi3"), text, sampling=GREEDY, steps=0)
    assert len(llama.runs[0].stacks[0].tokens) > 64
    same_shares(torch.runs[0].stacks[0], llama.runs[0].stacks[0])


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoders_parts_add_in_torch_what_they_add_in_llama_cpp(name: str, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / name, name, "ForSequenceClassification", overrides=LABELS)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    torch, llama = explain_checkpoint(source, TEXT), explain_gguf(tmp_path / "model.gguf", TEXT)
    same_shares(torch.runs[0].stacks[0], llama.runs[0].stacks[0])
    has_norm_after = name != "modernbert"
    assert torch.runs[0].stacks[0].blocks[0].is_normed == has_norm_after
    assert ("A norm follows each addition" in page(torch)) == has_norm_after


@pytest.mark.parametrize("family", ["t5", "flan-t5"])
def test_both_sides_parts_add_in_torch_what_they_add_in_llama_cpp(family: str, tmp_path: Path) -> None:
    source = write_seq2seq(tmp_path / family, family)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    torch = explain_checkpoint(source, TEXT, sampling=GREEDY, steps=0).runs[0]
    llama = explain_gguf(tmp_path / "model.gguf", TEXT, sampling=GREEDY, steps=0).runs[0]
    for mine, other in zip(torch.stacks, llama.stacks, strict=True):
        same_shares(mine, other)
    assert all(block.cross_share for block in torch.stacks[1].blocks)


@pytest.mark.parametrize("family", ["bart", "mbart", "bert2bert"])
def test_attention_to_the_source_is_a_part_of_its_own(family: str, tmp_path: Path) -> None:
    source = write_seq2seq(tmp_path / family, family)
    encoder, decoder = explain_checkpoint(source, TEXT, sampling=GREEDY, steps=0).runs[0].stacks
    import torch
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).eval()
    calls = Calls(model)
    ids = {"input_ids": encoder, "decoder_input_ids": decoder}
    with torch.no_grad():
        model(**{name: torch.tensor([[token.id for token in stack.tokens]]) for name, stack in ids.items()})
    is_bert = family == "bert2bert"
    for layer, block in enumerate(decoder.blocks):
        at = f"decoder.bert.encoder.layer.{layer}" if is_bert else f"model.decoder.layers.{layer}"
        names = ("self_attn", "encoder_attn", "fc2")
        if is_bert:
            names = ("attention.output.dense", "crossattention.output.dense", "output.dense")
        own, cross, mlp = (calls.of[f"{at}.{one}"][1] for one in names)
        if family == "mbart":  # Norms before its parts.
            before = calls.of[at][0]
            states = (before, before + own, before + own + cross)
        else:
            norms = ("attention", "crossattention") if is_bert else ("self_attn_layer_norm", "encoder_attn_layer_norm")
            states = (calls.of[at][0], *(calls.of[f"{at}.{one}"][1] for one in norms))
        expected = [calls.share(*pair) for pair in zip((own, cross, mlp), states, strict=True)]
        assert [block.attention_share, block.cross_share, block.mlp_share] == pytest.approx(expected, rel=1e-4)
        assert block.is_normed == (family != "mbart")
        assert block.cross_share


def test_an_adapters_share_is_in_what_parts_add(tmp_path: Path) -> None:
    base_dir = checkpoint("llama")
    peft_dir = write_adapter(tmp_path / "peft", base_dir, target_modules=["q_proj", "o_proj", "down_proj"])
    lora = export_adapter(peft_dir, tmp_path / "lora.gguf", base_dir=base_dir, outtype="f32").path
    torch = explain_checkpoint(base_dir, TEXT, lora=[LoraSpec(peft_dir)], sampling=GREEDY, steps=0)
    llama = explain_gguf(base_gguf("llama"), TEXT, lora=[LoraSpec(lora)], sampling=GREEDY, steps=0)
    for mine, other in zip(torch.runs, llama.runs, strict=True):
        same_shares(mine.stacks[0], other.stacks[0])
    base, adapted = (run.stacks[0].blocks[0] for run in torch.runs)
    assert adapted.attention_share != base.attention_share
    assert adapted.mlp_share != base.mlp_share
    assert base.mlp_share is not None
    assert adapted.mlp_share is not None
    assert f"{percent(base.mlp_share)} → {percent(adapted.mlp_share)}" in page(torch)


def test_a_bottleneck_adapter_is_in_what_parts_add(tmp_path: Path) -> None:
    import torch
    import transformers

    from edgetune.engine.torch.bottlenecks import BottleneckModel
    from tests.test_explain_torch_kinds import write_bottlenecks

    base = checkpoint("llama")
    adapter = write_bottlenecks(tmp_path / "houlsby", base)
    shown = explain_checkpoint(base, TEXT, lora=[LoraSpec(adapter)], sampling=GREEDY, steps=0).runs[1].stacks[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    adapted = BottleneckModel(model)
    adapted.read(adapter, json.loads((adapter / "adapter_config.json").read_text()), "houlsby")
    calls = Calls(model)
    with torch.no_grad():
        model(torch.tensor([[token.id for token in shown.tokens]]))
    for layer, block in enumerate(shown.blocks):
        expected = pre_norm(calls, f"model.layers.{layer}", "self_attn", "mlp")
        assert (block.attention_share, block.mlp_share) == pytest.approx(expected, rel=1e-4)
