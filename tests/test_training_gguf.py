"""Training on a GGUF file: torch computes from its blocks what llama.cpp does, and the adapter is proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgetune.artifacts import Run
from edgetune.cli.main import run
from edgetune.data import load_tokenizer, read_dataset, tokenize
from edgetune.errors import MismatchError
from edgetune.export import CONFIG_KEY, export_base
from edgetune.fingerprint import fingerprint_checkpoint
from edgetune.gguf_header import read_gguf_header
from edgetune.gguf_tensors import GgufTensors
from edgetune.training.gguf_base.blocks import Blocks
from edgetune.training.gguf_base.config import read_gguf_config
from edgetune.training.gguf_base.load import load_gguf_base, prove
from edgetune.training.gguf_base.modules import BlockEmbedding, BlockLinear
from edgetune.training.gguf_base.tokenizer import load_gguf_tokenizer
from edgetune.training.settings import TrainSettings
from tests.checkpoints import DECODERS
from tests.ggufs import base_gguf, checkpoint

CPU = torch.device("cpu")


def load(path: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = transformers.AutoConfig.for_model(**{**read_gguf_config(path), **changes})
    return load_gguf_base(path, config, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized file that edgetune made, which says which checkpoint it comes from and how that is configured."""
    return export_base(checkpoint("llama"), tmp_path_factory.mktemp("gguf") / "llama.gguf", quant="Q4_K_M").path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"fox {n}"}, {"role": "assistant", "content": f"dog {n} and fox"}]}
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return path


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_computes_from_a_file_from_elsewhere_what_llama_cpp_does(family: str) -> None:
    path = base_gguf(family)
    assert CONFIG_KEY not in read_gguf_header(path).metadata
    model = load(path)
    kl, _ = prove(model, path, read_gguf_header(path))
    assert kl < 1e-4
    assert any(isinstance(module, BlockLinear) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_of_edgetunes_own_carries_its_config(tmp_path: Path) -> None:
    path = export_base(checkpoint("llama3-rope"), tmp_path / "own.gguf", outtype="f32").path
    assert read_gguf_config(path)["rope_parameters"]["rope_type"] == "llama3"
    kl, _ = prove(load(path), path, read_gguf_header(path))
    assert kl < 1e-4


def test_a_coarse_file_is_used_as_it_is(coarse: Path) -> None:
    model = load(coarse)
    kinds = {module.blocks.kind for module in model.modules() if isinstance(module, BlockLinear)}
    assert kinds <= {"Q4_K", "Q6_K"}
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.01 * sum(
        np.prod(tensor.shape) for tensor in read_gguf_header(coarse).tensors
    )


def test_the_numbers_are_the_files_own(coarse: Path) -> None:
    model, tensors = load(coarse), GgufTensors(coarse)
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    np.testing.assert_array_equal(down.weight.numpy(), tensors.read("blk.0.ffn_down.weight"))
    # Rotary rows lie interleaved in the file, and in halves in transformers.
    query, stored = model.get_submodule("model.layers.0.self_attn.q_proj").weight, tensors.read("blk.0.attn_q.weight")
    np.testing.assert_array_equal(query.numpy()[:32], np.concatenate([stored[0:32:2], stored[1:32:2]]))


def test_a_wrong_config_is_noticed() -> None:
    with pytest.raises(MismatchError, match="does not compute"):
        load(base_gguf("llama"), rope_parameters={"rope_type": "default", "rope_theta": 100.0})


def test_layers_in_blocks_have_the_gradients_of_plain_ones(coarse: Path) -> None:
    tensors = GgufTensors(coarse)
    name = "blk.0.ffn_up.weight"
    blocks = Blocks(tensors.raw(name), tensors.type(name), tensors.shape(name)[-1])
    layer = BlockLinear(blocks, torch.ones(blocks.shape[0]), dtype=torch.float32, device=CPU)
    plain = torch.nn.Linear(blocks.shape[1], blocks.shape[0])
    plain.load_state_dict({"weight": layer.weight, "bias": torch.ones(blocks.shape[0])})
    inputs = [torch.randn(3, blocks.shape[1], requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [module(x) for module, x in zip((layer, plain), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for out in outputs:
        (out**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


@pytest.mark.parametrize(
    ("scale", "cap", "with_bias"), [(1.0, 0.0, False), (0.5, 0.0, True), (1.0, 5.0, False), (2.0, 3.0, True)]
)
def test_the_loss_of_a_head_in_blocks_is_that_of_a_plain_one(
    coarse: Path, scale: float, cap: float, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.training import fused_loss_blocks
    from edgetune.training.fused_loss import FusedHead
    from edgetune.training.gguf_base import blocks as module

    tensors = GgufTensors(coarse)
    name = "token_embd.weight"
    blocks = Blocks(tensors.raw(name), tensors.type(name), tensors.shape(name)[-1])
    # Several pieces of the vocabulary, the last one smaller, and several stretches of tokens.
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", blocks.columns * (blocks.shape[0] // 3 + 1))
    monkeypatch.setattr(fused_loss_blocks, "TOKENS", 48)
    torch.manual_seed(0)
    bias = torch.randn(blocks.shape[0]) if with_bias else None
    layer = BlockLinear(blocks, bias, dtype=torch.float32, device=CPU)
    plain = torch.nn.Linear(blocks.columns, blocks.shape[0], bias=with_bias)
    plain.load_state_dict({"weight": layer.weight, **({"bias": bias} if bias is not None else {})})
    plain.requires_grad_(False)
    labels = torch.randint(0, blocks.shape[0], (101,))
    inputs = [(torch.randn(101, blocks.columns) * 3).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    losses = [
        FusedHead(None, head, scale, cap).summed_loss(x, labels) for head, x in zip((layer, plain), inputs, strict=True)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        (loss / 7).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            FusedHead(None, layer, scale, cap).summed_loss(inputs[0], labels), losses[0].detach()
        )


def test_no_step_makes_the_whole_head(
    coarse: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.training.gguf_base import blocks as module

    matrix, made = Blocks.matrix, list[int]()

    def watched(self: Blocks, *args: Any) -> torch.Tensor:
        made.append(len(self.raw))
        return matrix(self, *args)

    vocabulary = read_gguf_config(coarse)["vocab_size"]
    monkeypatch.setattr(Blocks, "matrix", watched)
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 1 << 12)
    assert train(coarse, rows, tmp_path / "run") == 0
    assert made
    assert vocabulary not in made


def test_an_embedding_in_blocks_gives_its_rows() -> None:
    tensors = GgufTensors(base_gguf("llama"))
    name = "token_embd.weight"
    blocks = Blocks(tensors.raw(name), tensors.type(name), tensors.shape(name)[-1])
    table = BlockEmbedding(blocks, scale=2.0, dtype=torch.float32, device=CPU)
    ids = torch.tensor([[5, 7, 5], [0, 1, 2]])
    torch.testing.assert_close(table(ids), 2.0 * torch.from_numpy(tensors.read(name))[ids])


def test_ids_and_masks_are_those_of_the_checkpoint(rows: Path) -> None:
    dataset = read_dataset([rows], has_template=True, splits=("train",))
    ours = tokenize(dataset, load_gguf_tokenizer(base_gguf("llama")), max_length=64)["train"].sequences
    theirs = tokenize(dataset, load_tokenizer(checkpoint("llama")), max_length=64)["train"].sequences
    assert len(ours) == len(theirs) == 12
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.ids.tolist() == other.ids.tolist()
        assert mine.learned.tolist() == other.learned.tolist()


def train(path: Path, rows: Path, out: Path, *more: str) -> int:
    return run(["train", "-m", str(path), "-d", str(rows), "-o", str(out), "--steps", "4", "--lr", "5e-3", *more])


def test_from_the_file_to_a_proved_adapter(
    coarse: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(coarse, rows, tmp_path / "run") == 0, capsys.readouterr().err
    record = Run.load(tmp_path / "run")
    assert record.base_path == coarse
    assert record.fingerprint == fingerprint_checkpoint(checkpoint("llama"))
    capsys.readouterr()
    assert run(["convert", str(tmp_path / "run"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kind"] == "adapter"
    assert values["parity"]["passed"]
    assert run(["generate", str(coarse), "--lora", values["path"], "fox 3", "-n", "4", "--temp", "0"]) == 0


def test_an_adapter_that_learned_next_to_nothing_is_proved_on_a_16_bit_base(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp rounds what it multiplies with 16-bit weights; torch's simulation of 8 bits knows nothing of it."""
    base = export_base(checkpoint("llama"), tmp_path / "base.gguf", outtype="bf16").path
    assert train(base, rows, tmp_path / "run", "--steps", "1", "--lr", "1e-6") == 0
    capsys.readouterr()
    assert run(["convert", str(tmp_path / "run")]) == 0, capsys.readouterr().err


def test_an_adapter_of_another_strength_does_not_pass(
    coarse: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import converters.adapter

    assert train(coarse, rows, tmp_path / "run") == 0
    original = converters.adapter._Pairs.matrices

    def doubled(self: Any, *, fold: bool) -> Any:
        a, b = original(self, fold=fold)
        return a, 2 * b

    monkeypatch.setattr(converters.adapter._Pairs, "matrices", doubled)
    assert run(["convert", str(tmp_path / "run")]) == 4
    assert "is not what was trained" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_adapter(coarse: Path, rows: Path, tmp_path: Path) -> None:
    from edgetune.errors import InterruptedRun
    from edgetune.events import Event, Metrics
    from edgetune.training.run import resume
    from edgetune.training.run import train as train_run

    settings = TrainSettings(model=str(coarse), data=(str(rows),), steps=4, save_every=1, dtype="f32")
    whole = train_run(TrainSettings(**{**settings.__dict__, "out": str(tmp_path / "whole")}))

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 2 and event.split == "train":
            raise Stop

    with pytest.raises((Stop, InterruptedRun)):
        train_run(TrainSettings(**{**settings.__dict__, "out": str(tmp_path / "cut")}), sink=stop)
    resume(tmp_path / "cut")
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (whole.path / name).read_bytes()


def test_bad_bases_are_one_sentence(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(base_gguf("llama").read_bytes()[:5000])
    assert train(broken, rows, tmp_path / "a") == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert not (tmp_path / "a").exists()
