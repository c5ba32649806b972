"""Every training method on small real models: it learns, resumes bit for bit, and what it saves is what it trained."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.engine.protocol import LoraSpec
from edgetune.errors import EdgetuneError, InterruptedRun, UnsupportedError, UsageError
from edgetune.events import Event, Metrics
from edgetune.export import export_adapter, export_base
from edgetune.training import TrainSettings, resume, train
from edgetune.training.methods import METHODS, find_method
from tests.adapters import IDS, gguf_logits, peft_logits
from tests.checkpoints import DECODERS, edit_json, write_checkpoint
from tests.task_models import write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

LORAS = ["rslora", "dora", "lora+", "pissa", "olora"]
OWN = ["houlsby", "pfeiffer"]
RATES = {"full": 2e-3, "prompt": 5e-2, "pissa": 2e-3, "olora": 2e-4, "houlsby": 1e-2, "pfeiffer": 1e-2, "lora+": 1e-3}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("decoder") / "tiny", "llama", overrides=SIZES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("encoder") / "bert", "bert")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": word * count}, {"role": "assistant", "content": f"{word}!"}]}
        for word in ("fox", "dog", "quick", "brown")
        for count in (1, 2)
    ]
    return write_rows(tmp_path_factory.mktemp("chats"), {"train": rows, "valid": rows[::2]})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": f"the {colour} {thing}", "label": colour} for colour in ("red", "blue") for thing in ("cat", "dog")
    ]
    return write_rows(tmp_path_factory.mktemp("labelled"), {"train": rows, "valid": rows})


@pytest.fixture
def settings(decoder: Path, chats: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        model=str(decoder), data=(str(chats),), out=str(tmp_path / "run"), dtype="f32", lr=5e-3, rank=4, alpha=8,
        bottleneck=8, prompt_tokens=4, schedule="constant", steps=12,
    )  # fmt: skip


def told(settings: TrainSettings, method: str, **changes: Any) -> TrainSettings:
    return replace(settings, method=method, lr=RATES.get(method, 5e-3), **changes)


def stop_after(steps: int) -> Any:
    def sink(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == steps and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)

    return sink


def files(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")}


def trained_logits(method: str, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The run, and the logits of the model as it was when training ended."""
    import torch

    seen: dict[str, Any] = {}
    kind = type(find_method(method))
    publish = kind.publish

    def looked_at(self: Any, adapted: Any, directory: Path, model_dir: Path) -> None:
        adapted.eval()
        with torch.no_grad():
            seen["logits"] = adapted(**_inputs(adapted)).logits[0].float()
        publish(self, adapted, directory, model_dir)

    monkeypatch.setattr(kind, "publish", looked_at)
    run = train(settings)
    return run, seen["logits"].numpy()


@pytest.mark.parametrize("method", METHODS.own)
def test_a_method_learns_and_resumes_to_the_same_bytes(method: str, settings: TrainSettings, tmp_path: Path) -> None:
    whole = train(told(settings, method, out=str(tmp_path / "whole"), save_every=3))
    assert whole.metrics["valid_loss"] < 0.9 * whole.metrics["valid_before_loss"]
    assert whole.method == method
    assert files(whole.path)
    with pytest.raises(InterruptedRun):
        train(told(settings, method, save_every=3), sink=stop_after(7))
    assert files(resume(Path(settings.out)).path) == files(whole.path)


@pytest.mark.parametrize("method", [*LORAS, *OWN, "full", "qlora"])
def test_a_method_classifies_with_an_encoder(
    method: str, settings: TrainSettings, encoder: Path, labelled: Path
) -> None:
    lr = {"olora": 4e-3}.get(method, 5e-3)
    given = replace(settings, method=method, lr=lr, model=str(encoder), data=(str(labelled),), steps=20)
    run = train(given)
    assert run.metrics["valid_loss"] < 0.9 * run.metrics["valid_before_loss"]
    if method in OWN:
        names = "".join(_names(run.path))
        assert "classifier.weight" in names
        assert ("LayerNorm" in names) is (method == "houlsby")


@pytest.mark.parametrize("method", LORAS)
def test_peft_runs_what_was_saved_on_the_original_base(
    method: str, settings: TrainSettings, decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, logits = trained_logits(method, told(settings, method), monkeypatch)
    assert abs(logits - peft_logits(decoder, run.path)).max() < 2e-4
    assert abs(logits - peft_logits(decoder, None)).max() > 0.1
    config = json.loads((run.path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if method in ("pissa", "olora") else 4)


@pytest.mark.parametrize("method", ["rslora", "lora+", "pissa", "olora"])
def test_a_gguf_adapter_answers_as_it_was_trained(
    method: str, settings: TrainSettings, decoder: Path, tmp_path: Path
) -> None:
    run = train(told(settings, method))
    base = export_base(decoder, tmp_path / "base.gguf", outtype="f32")
    adapter = export_adapter(run.path, tmp_path / "adapter.gguf")
    assert abs(gguf_logits(base.path, adapter.path) - peft_logits(decoder, run.path)).max() < 0.02


def test_dora_is_merged_or_refused(settings: TrainSettings, decoder: Path, tmp_path: Path) -> None:
    run = train(told(settings, "dora"))
    with pytest.raises(UnsupportedError, match="DoRA"):
        export_adapter(run.path, tmp_path / "adapter.gguf")
    merged = export_base(decoder, tmp_path / "merged.gguf", outtype="f32", merge=run.path)
    assert abs(gguf_logits(merged.path) - peft_logits(decoder, run.path)).max() < 1e-3


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_start_in_the_base_changes_nothing_and_stands_still(
    method: str, rslora: bool, decoder: Path, settings: TrainSettings
) -> None:
    import torch

    from edgetune.events import ignore
    from edgetune.training.tasks import find_task

    task, kind = find_task("completion"), find_method(method)
    given = told(settings, method, rslora=rslora, rank_pattern={"o_proj": 6})
    model = kind.load_base(decoder, _config(decoder), task, dtype=torch.float32, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = kind.attach(model, given, decoder, task, sink=ignore)
    layer = adapted.get_base_model().model.layers[0].self_attn.o_proj
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    assert a.shape[0] == 12
    assert scale == pytest.approx(8 / (6**0.5 if rslora else 6))
    assert torch.equal(layer.get_base_layer().weight, before["model.layers.0.self_attn.o_proj.weight"])
    weight, start = layer.get_base_layer().weight, a.detach().clone()
    first = b[:, :6] @ a[:6] * (scale if method == "pissa" else 1)
    u, s, vh = torch.linalg.svd(weight)
    if method == "pissa":
        torch.testing.assert_close(first, (u[:, :6] * s[:6]) @ vh[:6], atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(b[:, :6].t() @ b[:, :6], torch.eye(6), atol=1e-5, rtol=0)
    ids = torch.tensor([IDS])
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(input_ids=ids).logits
    optimizer = kind.make_optimizer(adapted, given, torch.device("cpu"))
    logits = adapted(input_ids=ids).logits
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)
    logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(a[6:], start[6:])
    assert not torch.equal(a[:6], start[:6])


def test_a_principal_start_refuses_weight_decay_and_embeddings(settings: TrainSettings) -> None:
    with pytest.raises(UsageError, match="--weight-decay"):
        train(told(settings, "pissa", weight_decay=0.1))
    with pytest.raises(UsageError, match="linear layers only"):
        train(told(settings, "olora", target_modules=("embed_tokens", "q_proj")))


def test_b_learns_faster_under_lora_plus(settings: TrainSettings, decoder: Path) -> None:
    import torch

    from edgetune.events import ignore
    from edgetune.training.tasks import find_task

    task, kind = find_task("completion"), find_method("lora+")
    model = kind.load_base(decoder, _config(decoder), task, dtype=torch.float32, device=torch.device("cpu"))
    adapted = kind.attach(model, settings, decoder, task, sink=ignore)
    first, second = kind.parameter_groups(adapted, replace(settings, lora_plus_ratio=4.0))
    assert second["ratio"] == 4.0
    assert "ratio" not in first
    assert len(first["params"]) == len(second["params"]) > 0
    run = train(told(settings, "lora+", steps=1, eval=False, warmup=0.0))
    # Adam's first step is the learning rate itself: 16 times 1e-3 for B, which starts at 0.
    import safetensors.torch

    tensors = safetensors.torch.load_file(run.path / "adapter_model.safetensors")
    moved = max(value.abs().max().item() for name, value in tensors.items() if "lora_B" in name)
    assert moved == pytest.approx(16e-3, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_full_run_is_a_checkpoint_that_converts(
    family: str, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_checkpoint(tmp_path / "base", family, overrides=SIZES)
    run, logits = trained_logits("full", told(settings, "full", model=str(base)), monkeypatch)
    assert not (run.path / "adapter_config.json").exists()
    assert abs(logits - peft_logits(run.path, None)).max() < 1e-4
    assert abs(logits - peft_logits(base, None)).max() > 0.1
    names = _names(run.path, "model.safetensors")
    assert ("lm_head.weight" in names) is (family == "llama")
    gguf = export_base(run.path, tmp_path / "full.gguf", outtype="f32")
    assert abs(gguf_logits(gguf.path) - logits).max() < 1e-3


def test_a_full_run_in_bf16_keeps_small_steps_and_the_bases_type(settings: TrainSettings, tmp_path: Path) -> None:
    from edgetune.fingerprint import read_safetensors_header

    base = write_checkpoint(tmp_path / "base", "llama", overrides=SIZES, dtype="bfloat16")
    run = train(told(settings, "full", model=str(base), dtype="bf16"))
    assert run.metrics["valid_loss"] < 0.9 * run.metrics["valid_before_loss"]
    header = read_safetensors_header(run.path / "model.safetensors")[0]
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    checkpoint = next(run.path.glob("checkpoint-*"))
    saved = read_safetensors_header(checkpoint / "adapter_model.safetensors")[0]
    assert {entry["dtype"] for entry in saved.values()} == {"F32"}


@pytest.mark.parametrize("method", OWN)
def test_the_torch_engine_runs_bottlenecks(
    method: str, settings: TrainSettings, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.engine.torch.engine import TorchEngine

    run, logits = trained_logits(method, told(settings, method), monkeypatch)
    plain = peft_logits(decoder, None)
    with TorchEngine.open(decoder, dtype="f32", device="cpu") as engine:
        for adapters, expected in (
            ([LoraSpec(run.path, 1.0)], logits),
            ([], plain),
            ([LoraSpec(run.path, 1.0)], logits),
        ):
            engine.set_adapters(adapters)
            assert abs(_engine_logits(engine) - expected).max() < 2e-4
        with pytest.raises(UnsupportedError, match="cannot be scaled"):
            engine.set_adapters([LoraSpec(run.path, 0.5)])
        lora = train(told(settings, "lora", out=str(tmp_path / "lora"), steps=1)).path
        with pytest.raises(UnsupportedError, match="beside bottleneck adapters"):
            engine.set_adapters([LoraSpec(lora, 1.0)])
    assert abs(logits - plain).max() > 0.1
    with pytest.raises(UnsupportedError, match="between the model's"):
        export_adapter(run.path, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("family", DECODERS)
def test_every_familys_sub_layers_are_found(family: str) -> None:
    import torch
    import transformers

    from edgetune.engine.torch.bottlenecks import find_places

    name, sizes = DECODERS[family]
    with torch.device("meta"):
        config = getattr(transformers, name)(vocab_size=500, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    attention, both = find_places(model, ["attention"]), find_places(model, ["attention", "feed_forward"])
    assert len(attention) == 2
    assert len(both) == 4


def test_a_model_of_unknown_sub_layers_is_refused() -> None:
    import torch

    from edgetune.engine.torch.bottlenecks import find_places

    with pytest.raises(UnsupportedError, match="is not known"):
        find_places(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["attention"])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_has_bottlenecks_in_both_halves(
    family: str, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.engine.torch.engine import TorchEngine

    base = write_model(tmp_path / family, family)
    rows = [{"source": "the red house", "target": "haus"}, {"source": "the dog", "target": "hund"}]
    data = write_rows(tmp_path / "rows", {"train": rows, "valid": rows})
    given = replace(settings, method="houlsby", model=str(base), data=(str(data),), lr=1e-2, steps=60, task="seq2seq")
    run, logits = trained_logits("houlsby", given, monkeypatch)
    assert run.metrics["valid_loss"] < 0.9 * run.metrics["valid_before_loss"]
    names = _names(run.path)
    assert any("decoder" in name and ".bottleneck." in name for name in names)
    assert any("encoder." in name and ".bottleneck." in name for name in names)
    with TorchEngine.open(base, dtype="f32", device="cpu", lora=[LoraSpec(run.path, 1.0)]) as engine:
        assert abs(_engine_logits(engine) - logits).max() < 2e-4
        engine.set_adapters([])
        assert abs(_engine_logits(engine) - logits).max() > 0.1


def test_a_damaged_bottleneck_adapter_is_refused(settings: TrainSettings, decoder: Path, tmp_path: Path) -> None:
    from edgetune.engine.torch.engine import TorchEngine

    run = train(told(settings, "houlsby", steps=1, eval=False))
    for changes in ({"bottleneck": 9}, {"bottleneck": 0}, {"places": ["head"]}, {"layer_norms": False}):
        before = (run.path / "adapter_config.json").read_text()
        edit_json(run.path / "adapter_config.json", **changes)
        with pytest.raises(EdgetuneError):
            TorchEngine.open(decoder, dtype="f32", device="cpu", lora=[LoraSpec(run.path, 1.0)])
        (run.path / "adapter_config.json").write_text(before)
    with pytest.raises(UnsupportedError, match="int8"):
        TorchEngine.open(decoder, dtype="int8", device="cpu", lora=[LoraSpec(run.path, 1.0)])


def test_a_trained_prompt_is_what_peft_runs(
    settings: TrainSettings, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.engine.torch.engine import TorchEngine

    run, logits = trained_logits("prompt", told(settings, "prompt"), monkeypatch)
    assert len(logits) == len(IDS) + 4
    assert abs(logits - peft_logits(decoder, run.path)).max() < 2e-4
    with pytest.raises(UnsupportedError, match="in front of the text"):
        export_adapter(run.path, tmp_path / "adapter.gguf")
    with pytest.raises(UnsupportedError, match="which this engine does not"):
        TorchEngine.open(decoder, dtype="f32", device="cpu", lora=[LoraSpec(run.path, 1.0)])


def test_what_a_method_is_not_for_is_refused_before_anything_is_written(
    settings: TrainSettings, encoder: Path, labelled: Path, decoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="classification is another task"):
        train(told(settings, "prompt", model=str(encoder), data=(str(labelled),)))
    gguf = export_base(decoder, tmp_path / "base.gguf", outtype="f32")
    for method in ("full", "qlora", "houlsby", "prompt"):
        with pytest.raises(UnsupportedError):
            train(told(settings, method, model=str(gguf.path)))
    with pytest.raises(UsageError, match="--bottleneck"):
        train(told(settings, "houlsby", bottleneck=0))
    assert not Path(settings.out).exists()


def test_qlora_holds_the_base_in_4_bits(settings: TrainSettings, decoder: Path) -> None:
    import torch

    from edgetune.events import ignore
    from edgetune.training.tasks import find_task

    task, kind = find_task("completion"), find_method("qlora")
    model = kind.load_base(decoder, _config(decoder), task, dtype=torch.float32, device=torch.device("cpu"))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    adapted = kind.attach(model, settings, decoder, task, sink=ignore)
    assert type(kind.make_optimizer(adapted, settings, torch.device("cpu"))).__name__ == "AdamW8bit"


@pytest.mark.parametrize(("method", "share"), [("lora", 1.0), ("qlora", 0.5), ("full", 0.0)])
def test_the_plan_knows_what_a_methods_weights_take(method: str, share: float, settings: TrainSettings) -> None:
    from edgetune.training.forecast import forecast

    def weights(name: str) -> int:
        return forecast(told(settings, name)).cases[0].memory.weights

    assert weights(method) <= share * weights("lora")


def test_a_trained_prompt_is_not_forecast(settings: TrainSettings) -> None:
    from edgetune.training.forecast import forecast

    with pytest.raises(UnsupportedError, match="not forecast"):
        forecast(told(settings, "prompt"))


def test_another_package_adds_a_method(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "norms-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "norms.py").write_text(
        "from edgetune.training.methods.full import Full\n"
        "class Biases(Full):\n"
        "    def attach(self, model, settings, model_dir, task, *, sink):\n"
        "        for name, parameter in model.named_parameters():\n"
        "            parameter.requires_grad_('norm' in name)\n"
        "        return model\n"
        "NORMS = Biases()\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norms\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgetune.methods]\nnorms = norms:NORMS\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    run = train(replace(settings, method="norms", lr=2e-2))
    assert run.method == "norms"
    assert run.metrics["valid_loss"] < run.metrics["valid_before_loss"]


def _inputs(model: Any) -> dict[str, Any]:
    import torch

    if not model.config.is_encoder_decoder:
        return {"input_ids": torch.tensor([IDS])}
    ids = torch.tensor([[number % 60 for number in IDS]])
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def _config(path: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(path)


def _names(run_dir: Path, file: str = "adapter_model.safetensors") -> set[str]:
    from edgetune.fingerprint import read_safetensors_header

    return set(read_safetensors_header(run_dir / file)[0])


def _engine_logits(engine: Any) -> Any:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return engine.model(**_inputs(engine.model)).logits[0].float().numpy()
