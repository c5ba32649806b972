"""Blocks of every type, mixtures and GPT-2 as a base in a file: an adapter's gradients are those of plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgetune.cli.main import run
from edgetune.export import export_base
from edgetune.gguf_header import read_gguf_header
from edgetune.training.fused_lora import fuse_lora
from edgetune.training.gguf_base.config import read_gguf_config
from edgetune.training.gguf_base.experts import DOWN, GATE_UP, BlockExperts
from edgetune.training.gguf_base.load import load_gguf_base
from edgetune.training.gguf_base.modules import BlockEmbedding, BlockLinear
from edgetune.training.model import add_adapter
from edgetune.training.settings import TrainSettings
from edgetune.training.tasks import find_task
from tests.ggufs import checkpoint

CPU = torch.device("cpu")
TYPES = {
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q8_0": "Q8_0",
    "Q2_K": "Q2_K",
    "Q3_K_M": "Q3_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "F16": "F16",
    "BF16": "BF16",
}
"""Type of a file → a type that its matrices have."""


def load(path: Path) -> Any:
    config = transformers.AutoConfig.for_model(**read_gguf_config(path))
    return load_gguf_base(path, config, dtype=torch.float32, device=CPU)


def plain_copy(base: Any) -> Any:
    """transformers' own model with the numbers that the blocks of `base` stand for."""
    model = transformers.AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, BlockLinear | BlockEmbedding):
                own = model.get_submodule(name)
                turned = type(own).__name__ == "Conv1D"
                own.weight.copy_(module.weight.t() if turned else module.weight)
            elif isinstance(module, BlockExperts):
                own = model.get_submodule(name)
                gate, up, down = (
                    torch.stack([one.matrix(torch.float32, CPU) for one in stack])
                    for stack in (module.gate, module.up, module.down)
                )
                own.get_parameter(GATE_UP).copy_(torch.cat([gate, up], dim=1))
                own.get_parameter(DOWN).copy_(down)
        inside = {name for name, module in base.named_modules() if isinstance(module, BlockExperts)}
        for name, parameter in base.named_parameters():
            if name.rpartition(".")[0] not in inside:
                model.get_parameter(name).copy_(parameter)
    return model.requires_grad_(False)


def gradients(model: Any, path: Path) -> dict[str, torch.Tensor]:
    """Of the loss of some tokens, by an adapter that changes something already."""
    settings = TrainSettings(rank=4, alpha=8)
    adapted = add_adapter(model, settings, path, task=find_task("completion")).eval()
    generator = torch.Generator().manual_seed(1)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for name in sorted(trained):
        if ".lora_B." in name:
            trained[name].data = 0.05 * torch.randn(trained[name].shape, generator=generator)
        else:
            width = trained[name].shape[1]
            trained[name].data = torch.randn(trained[name].shape, generator=generator) / width**0.5
    fuse_lora(adapted)
    ids = torch.arange(5, 45).view(2, 20)
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in trained.values())
    return {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}


def check_gradients(path: Path) -> None:
    base = load(path)
    plain = plain_copy(base)
    found, expected = gradients(base, path), gradients(plain, path.parent)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_on_blocks_of_every_type_has_the_gradients_of_plain_torch(kind: str, tmp_path: Path) -> None:
    path = export_base(checkpoint("llama"), tmp_path / "base.gguf", quant=kind).path
    assert TYPES[kind] in {tensor.type for tensor in read_gguf_header(path).tensors}
    check_gradients(path)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama-tied", "Q4_K_M"),
        ("gpt2", "Q4_K_M"),
        ("mixtral", "Q4_K_M"),
        ("mixtral", "MXFP4_MOE"),
        ("qwen3-moe", "IQ4_XS"),
    ],
)
def test_an_adapter_on_other_families_has_the_gradients_of_plain_torch(family: str, kind: str, tmp_path: Path) -> None:
    check_gradients(export_base(checkpoint(family), tmp_path / "base.gguf", quant=kind).path)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3-moe"])
def test_from_a_file_to_a_proved_adapter(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = export_base(checkpoint(family), tmp_path / "base.gguf", quant="Q4_K_M").path
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"fox {n}", "completion": f"dog {n}"}) + "\n" for n in range(8)))
    told = ["-d", str(rows), "--steps", "3", "--lr", "5e-3", "--samples", "0"]
    assert run(["train", "-m", str(path), "-o", str(tmp_path / "run"), *told]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run(["convert", str(tmp_path / "run"), "--json"]) == 0, capsys.readouterr().err
    values = json.loads(capsys.readouterr().out)
    assert values["parity"]["passed"]
    adapted = {tensor.name for tensor in read_gguf_header(Path(values["path"])).tensors}
    # The experts' stacks and the router, or all of GPT-2's transposed layers.
    wanted = ("ffn_down_exps", "ffn_gate_inp") if family != "gpt2" else ("ffn_up", "attn_qkv")
    assert {f"blk.1.{name}.weight.lora_b" for name in wanted} <= adapted
    assert run(["generate", str(path), "--lora", values["path"], "fox 3", "-n", "3", "--temp", "0"]) == 0


def test_experts_without_an_adapter_are_not_changed_by_one(tmp_path: Path) -> None:
    path = export_base(checkpoint("mixtral"), tmp_path / "base.gguf", quant="Q8_0").path
    base, ids = load(path), torch.arange(5, 25).view(1, 20)
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False).logits
        adapted = add_adapter(base, TrainSettings(rank=4), path, task=find_task("completion"))
        for name, parameter in adapted.named_parameters():
            if ".experts." in name and ".lora_B." in name:
                torch.nn.init.normal_(parameter)
        assert (adapted(input_ids=ids, use_cache=False).logits - before).abs().max() > 0.1
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids, use_cache=False).logits, before)


def test_experts_take_little_memory_beside_their_blocks(tmp_path: Path) -> None:
    path = export_base(checkpoint("mixtral"), tmp_path / "base.gguf", quant="Q4_K_M").path
    base = load(path).to(torch.bfloat16)
    held = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in base.parameters()}
    assert sum(held.values()) < 0.05 * path.stat().st_size
