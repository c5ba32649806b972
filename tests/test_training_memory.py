"""What training would take: what autograd keeps, traced without weights, against what it really keeps; and the plan."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgetune.cli.main import edgetune
from edgetune.data import Tokenized
from edgetune.errors import UnsupportedError
from edgetune.training import TrainSettings
from edgetune.training.forecast import Case, Forecast, forecast, probe, propose
from edgetune.training.memory import Frozen, Memory, estimate, frozen_base, kept_bytes, process_bytes
from tests.checkpoints import edit_json, write_checkpoint
from tests.speed_models import PACKED, adapted_model, speed_up
from tests.task_models import write_model, write_rows
from tests.test_tasks_training import rows_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "qwen2")


def really_kept(model: Any, length: int) -> int:
    """Bytes that autograd keeps of a packed row, parameters left out."""
    import torch

    from edgetune.training.fused_loss import find_head

    ids = np.random.default_rng(0).integers(1, 97, length).astype(np.int32)
    rows = [Tokenized(ids, np.ones(length, dtype=bool))]
    (batch,) = speed_up(model, rows).batches([rows])
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    head = find_head(model)
    assert head is not None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head.body(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        )
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3", "phi3", "gpt2"])
def test_what_is_traced_without_weights_is_what_is_kept(family: str) -> None:
    import peft
    import torch
    import transformers

    from edgetune.training.fused_lora import fuse_lora

    config_class, values = PACKED[family]
    if "sliding_window" in values:
        values = {**values, "sliding_window": 128}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    with torch.device("meta"):
        config = getattr(transformers, config_class)(**values)
        bare = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
        adapted = peft.get_peft_model(bare, lora)
    fuse_lora(adapted)
    traced, itemsize = kept_bytes(adapted, rows=1, length=128)
    assert itemsize == 4
    assert traced == pytest.approx(really_kept(adapted_model(config_class, values), 128), rel=0.15)
    assert kept_bytes(adapted, rows=2, length=128)[0] == pytest.approx(2 * traced, rel=0.05)


def test_attention_with_dropout_keeps_what_is_seen_on_the_cpu(tmp_path: Path) -> None:
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(4, 96, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids).tril())
    real = sum(storage.nbytes() for storage in kept.values())
    with torch.device("meta"):
        empty = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).train()
    assert kept_bytes(empty, rows=4, length=96)[0] == pytest.approx(real, rel=0.15)
    assert kept_bytes(empty, rows=4, length=96, on_cpu=False)[0] < 0.8 * real


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to")
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    import psutil
    import torch

    from edgetune.training.device import release_memory

    large, small = list[Any](), list[Any]()
    for _ in range(3000):
        large.append(torch.ones(25_000))
        small.append(torch.ones(100))
    large.clear()
    before = psutil.Process().memory_info().rss
    release_memory(torch.device("cpu"))
    assert before - psutil.Process().memory_info().rss > 100e6
    assert all(bool((kept == 1).all()) for kept in small)


def test_a_forecast_grows_with_length_and_checkpointing_takes_less(base_dir: Path) -> None:
    found = forecast(TrainSettings(model=str(base_dir), rank=4))
    assert [case.length for case in found.cases[::2]] == [256, 512]
    plain, lean = found.cases[::2], found.cases[1::2]
    assert plain[0].memory.activations * 1.9 < plain[1].memory.activations
    assert all(less.memory.total < more.memory.total for less, more in zip(lean, plain, strict=True))
    assert found.proposal == replace(
        TrainSettings(model=str(base_dir), rank=4), max_length=512, batch_size=8, grad_accum=1
    )
    wider = forecast(TrainSettings(model=str(base_dir), rank=16))
    assert wider.trainable_parameters == 4 * found.trainable_parameters
    assert wider.cases[0].memory.adapter == 4 * found.cases[0].memory.adapter


def test_the_proposal_checkpoints_only_where_it_is_needed() -> None:
    def cases(*fit: tuple[int, bool]) -> list[Case]:
        every = [(length, lean) for length in (512, 1024, 2048, 4096) for lean in (False, True)]
        return [Case(length, lean, Memory(1, 1, 1, 1, 1), (length, lean) in fit) for length, lean in every]

    def proposed(settings: TrainSettings, *fit: tuple[int, bool]) -> tuple[int, bool] | None:
        found = propose(settings, cases(*fit), most=2048)
        return (found.max_length, found.grad_checkpointing == "on") if found else None

    free, asked = TrainSettings(), TrainSettings(max_length=4096)
    everything = [(length, lean) for length in (512, 1024, 2048, 4096) for lean in (False, True)]
    assert proposed(free, *everything) == (2048, False)
    assert proposed(free, (512, False), (512, True), (1024, True)) == (1024, True)
    assert proposed(free) is None
    assert proposed(asked, *everything) == (4096, False)
    assert proposed(asked, (2048, False), (4096, True)) == (4096, True)
    assert proposed(asked, (2048, False)) is None


def test_the_probe_measures_a_speed(base_dir: Path) -> None:
    settings = TrainSettings(model=str(base_dir), rank=4, max_length=64, dtype="f32")
    assert probe(settings, seconds=0.1) > 0
    assert probe(replace(settings, grad_checkpointing="on"), seconds=0.1) > 0


def test_plan_tells_memory_and_a_command(base_dir: Path) -> None:
    told = CliRunner().invoke(edgetune, ["plan", "-m", str(base_dir), "--no-probe"])
    assert told.exit_code == 0
    assert told.stdout == f"edgetune train -m {base_dir} -d DATA --max-length 512 --batch-size 8\n"
    record = json.loads(CliRunner().invoke(edgetune, ["plan", "-m", str(base_dir), "--no-probe", "--json"]).stdout)
    assert record["proposal"] == {
        "max_length": 512, "batch_size": 8, "grad_accum": 1, "grad_checkpointing": False
    }  # fmt: skip
    assert record["tokens_per_second"] is None
    case = record["cases"][0]
    assert case["memory_bytes"] == sum(case["memory"].values())


def planned(model: Path, data: Path, **options: Any) -> int:
    """What a run on `data` is said to take."""
    from edgetune.training.prepare import plan, prepare

    settings = TrainSettings(model=str(model), data=(str(data),), dtype="f32", **options)
    found = plan(settings, prepare(settings)).memory_bytes
    assert found is not None
    return found


def test_a_dry_run_tells_what_the_plan_of_its_rows_is(base_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the " * 40, "completion": " fox"}, {"prompt": "the", "completion": " quick" * 20}] * 8
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings: dict[str, Any] = {"rank": 4, "task": "completion"}
    one = planned(base_dir, data, batch_size=1, **settings)
    four = planned(base_dir, data, batch_size=4, **settings)
    assert one < four
    assert planned(base_dir, data, batch_size=4, grad_checkpointing="on", **settings) < four
    assert planned(base_dir, data, batch_size=4, max_length=16, **settings) < four
    sixteen = planned(base_dir, data, batch_size=16, **settings)
    assert planned(base_dir, data, batch_size=16, packing=False, **settings) > sixteen
    assert planned(base_dir, data, batch_size=4, method="full", task="completion") > four


def test_how_the_base_lies_in_memory(base_dir: Path, tmp_path: Path) -> None:
    import torch

    from edgetune.export import export_base
    from edgetune.training.forecast import _without_weights
    from edgetune.training.methods import find_method

    def frozen(model: Path, method: str, dtype: torch.dtype) -> Frozen:
        _, adapted = _without_weights(TrainSettings(model=str(model), method=method, rank=4), model, dtype)
        return frozen_base(model, find_method(method), adapted, dtype)

    stored, size = torch.float32, (base_dir / "model.safetensors").stat().st_size
    whole, half = frozen(base_dir, "lora", stored), frozen(base_dir, "lora", torch.bfloat16)
    assert whole.weights == 2 * half.weights
    # Weights of another type than the files' exist twice for a while.
    assert (whole.mapped, half.mapped, frozen(base_dir, "full", torch.bfloat16).mapped) == (0, size, 0)
    assert frozen(base_dir, "full", stored).weights == 0
    gguf = export_base(base_dir, tmp_path / "base.gguf", outtype="f16").path
    in_blocks = frozen(gguf, "lora", stored)
    assert in_blocks.weights == gguf.stat().st_size
    assert in_blocks.piece > 0
    assert whole.piece == 0


def test_loading_counts_where_it_takes_more_than_a_step(base_dir: Path) -> None:
    import torch

    from edgetune.training.forecast import _without_weights

    _, adapted = _without_weights(TrainSettings(model=str(base_dir), rank=4), base_dir, torch.float32)

    def planned(base: Frozen, *, on_cpu: bool = True) -> Memory:
        sizes = {"rows": 1, "length": 64, "learned": 32}
        return estimate(adapted, base, checkpointing=False, fused=True, on_cpu=on_cpu, **sizes)

    plain, much = planned(Frozen(1000)), planned(Frozen(1000, mapped=1 << 40))
    assert plain.loading == planned(Frozen(1000, mapped=1000)).loading == 0
    assert much.total == much.runtime + 1000 + (1 << 40)
    assert planned(Frozen(1000, mapped=1 << 40), on_cpu=False).loading == 0
    # What the process has by now, its run will have as well.
    assert plain.runtime > process_bytes() > 50e6
    # A head in blocks is never a whole, nor are its logits.
    assert planned(Frozen(1000, piece=10)).loss < plain.loss


@pytest.mark.parametrize(
    ("kind", "family"),
    [("classification", "bert"), ("classification", "llama"), ("scored", "roberta"), ("embedding", "distilbert"),
     ("translation", "t5"), ("translation", "bart"), ("translation", "bert2bert")],
)  # fmt: skip
def test_every_task_has_a_plan(tmp_path: Path, kind: str, family: str) -> None:
    data = write_rows(tmp_path / "rows", {"train": rows_of(kind, 16)}) / "train.jsonl"
    options: dict[str, Any] = {"rank": 4, "packing": False}
    if kind == "translation":
        options |= {"task": "seq2seq", "src_lang": "en", "tgt_lang": "de"}
    else:
        options["task"] = {"scored": "regression"}.get(kind, kind)
    model = write_model(tmp_path / "model", family)
    assert planned(model, data, batch_size=4, **options) > planned(model, data, batch_size=2, **options)


def test_plan_says_when_nothing_fits(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.training import forecast as module

    monkeypatch.setattr(module, "free_memory_bytes", lambda device: 10_000_000)
    told = CliRunner().invoke(edgetune, ["plan", "-m", str(base_dir)])
    assert told.exit_code == 0
    assert told.stdout == ""
    assert "None of it fits" in told.stderr


def test_qlora_is_proposed_where_lora_does_not_fit(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.training import forecast as module

    asked = list[str]()
    real = forecast(TrainSettings(model=str(base_dir), rank=4))

    def of(settings: TrainSettings) -> Forecast:
        asked.append(settings.method)
        fits = settings.method == "qlora"
        return replace(real, method=settings.method, proposal=replace(settings, max_length=256) if fits else None)

    monkeypatch.setattr(module, "forecast", of)
    told = CliRunner().invoke(edgetune, ["plan", "-m", str(base_dir), "--no-probe"])
    assert told.stdout == f"edgetune train -m {base_dir} -d DATA --method qlora --max-length 256\n"
    assert asked == ["lora", "qlora"]
    asked.clear()
    assert CliRunner().invoke(edgetune, ["plan", "-m", str(base_dir), "--no-probe", "--method", "lora"]).stdout == ""
    assert asked == ["lora"]


def test_methods_are_planned_by_name(base_dir: Path) -> None:
    plans = {name: forecast(TrainSettings(model=str(base_dir), rank=4, method=name)) for name in ("lora", "full")}
    assert plans["full"].trainable_parameters == plans["full"].all_parameters
    assert plans["full"].cases[0].memory.adapter > plans["lora"].cases[0].memory.adapter
    assert plans["full"].cases[0].memory.weights == 0


def test_a_base_that_is_no_decoder_is_refused(base_dir: Path, tmp_path: Path) -> None:
    import shutil

    encoder = tmp_path / "encoder"
    shutil.copytree(base_dir, encoder)
    edit_json(encoder / "config.json", model_type="bert", architectures=["BertModel"])
    with pytest.raises(UnsupportedError):
        forecast(TrainSettings(model=str(encoder)))


_HOLES = """
import numpy, psutil
from edgetune.training.device import sparing_heap

del (warm := [numpy.ones(30 << 20, numpy.uint8)])[:]
before = psutil.Process().memory_info().rss
with sparing_heap():
    large = [numpy.ones(4 << 20, numpy.uint8) for _ in range(20)]
    small = numpy.ones(3 << 20, numpy.uint8)
    large.clear()
    print((psutil.Process().memory_info().rss - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_is_freed_below_something_that_stays_is_handed_back() -> None:
    """80 MiB below an array at the top of the heap, which is where they would stay."""
    printed = subprocess.run([sys.executable, "-c", _HOLES], capture_output=True, text=True, check=True).stdout
    assert int(printed) < 20
