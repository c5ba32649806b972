"""Training end to end on small real models: learning, PEFT's own loader, adapters' options, bases that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import Run
from edgetune.errors import (
    CorruptFileError,
    EdgetuneError,
    UnsupportedError,
    UsageError,
)
from edgetune.events import Event
from edgetune.training import TrainSettings, train
from edgetune.training.checkpoint import list_checkpoints
from tests.checkpoints import edit_json, write_checkpoint
from tests.tiny_runs import adapter_bytes, tiny_base, tiny_data, tiny_settings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(base_dir: Path, data_dir: Path, tmp_path: Path) -> TrainSettings:
    return tiny_settings(base_dir, data_dir, tmp_path / "run")


def test_the_loss_falls_and_the_run_is_a_peft_directory(settings: TrainSettings, base_dir: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(replace(settings, epochs=12))
    assert run.finished
    assert run.metrics["valid_loss"] < 0.5 * run.metrics["valid_before_loss"]
    assert Run.load(run.path).record() == run.record()
    assert run.fingerprint.weights
    assert run.data["splits"]["train"]["rows"] == 24

    base = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = PeftModel.from_pretrained(base, run.path)
    tokenizer = AutoTokenizer.from_pretrained(run.path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "foxfox"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = adapted.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0, prompt.shape[1] :]) == "fox!<|im_end|>"
    assert adapted.peft_config["default"].base_model_name_or_path == str(base_dir.resolve())

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, run.metrics["step"] + 1))
    assert (run.path / "loss.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(settings: TrainSettings, keep: int) -> None:
    run = train(replace(settings, steps=4, save_every=1, eval=False, keep_checkpoints=keep))
    assert [path.name for path in list_checkpoints(run.path)] == [f"checkpoint-{n}" for n in range(5 - keep, 5)]


def test_two_runs_are_equal(settings: TrainSettings, tmp_path: Path) -> None:
    first = train(replace(settings, steps=3, dropout=0.1))
    second = train(replace(settings, steps=3, dropout=0.1, out=str(tmp_path / "again")))
    third = train(replace(settings, steps=3, dropout=0.1, seed=1, out=str(tmp_path / "other")))
    assert adapter_bytes(first.path) == adapter_bytes(second.path) != adapter_bytes(third.path)
    assert (first.path / "adapter_config.json").read_bytes() == (second.path / "adapter_config.json").read_bytes()


def test_the_adapter_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    import torch

    from edgetune.training.model import write_tensors

    write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_loss_that_is_no_number_stops_the_run(settings: TrainSettings, base_dir: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    broken = Path(shutil.copytree(base_dir, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EdgetuneError, match="loss is no longer a number at step 1") as caught:
        train(replace(settings, model=str(broken), steps=2, eval=False))
    assert "--lr" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("q_proj", "embed_tokens", "lm_head")},
        {"target_modules": (r".*layers\.1\.mlp\.\w+_proj",)},
        {"rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 4.0}},
        {"target_modules": ("all-linear", "embed_tokens")},
        {"modules_to_save": ("lm_head",)},
        {"grad_checkpointing": "on"},
        {"dtype": "bf16"},
    ],
    ids=lambda options: "-".join(options),
)
def test_adapter_options(settings: TrainSettings, base_dir: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(replace(settings, steps=2, eval=False, **options))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), run.path)
    config = json.loads((run.path / "adapter_config.json").read_text())
    for name, value in options.items():
        if name in ("rank_pattern", "alpha_pattern"):
            assert config[name] == value
    assert config["use_rslora"] == options.get("rslora", False)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("q_proj", "vproj")},
        {"target_modules": ("all-linear", "embed")},
        {"target_modules": (".*nothing.*",)},
        {"target_modules": ("*[",)},
        {"rank_pattern": {"proj": 8}},
        {"alpha_pattern": {"q_proj": 8.0, "(": 2.0}},
        {"modules_to_save": ("heads",)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_name_that_no_module_has_is_refused(base_dir: Path, options: dict[str, Any]) -> None:
    import torch
    import transformers

    from edgetune.training.model import add_adapter
    from edgetune.training.tasks.causal import CausalTask

    config = transformers.AutoConfig.from_pretrained(base_dir)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        with pytest.raises(UsageError, match=r"fits no module|no regular expression"):
            add_adapter(model, TrainSettings(**options), base_dir, task=CausalTask("chat"))


def test_all_linear_beside_other_names_is_all_linear_and_them(base_dir: Path) -> None:
    import torch
    import transformers

    from edgetune.training.model import adapter_state, add_adapter
    from edgetune.training.tasks.causal import CausalTask

    config = transformers.AutoConfig.from_pretrained(base_dir)
    found = []
    for names in (("all-linear",), ("all-linear", "embed_tokens")):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
            adapted = add_adapter(model, TrainSettings(target_modules=names), base_dir, task=CausalTask("chat"))
        found.append({name.rsplit(".lora_", 1)[0] for name in adapter_state(adapted)})
    assert found[1] - found[0] == {"base_model.model.model.embed_tokens"}
    assert found[0] < found[1]


def test_a_tied_head_as_target_is_told(tmp_path: Path, data_dir: Path) -> None:
    base = write_checkpoint(tmp_path / "tied", "llama-tied", overrides={"hidden_size": 64, "num_attention_heads": 4})
    said: list[Event] = []
    told = TrainSettings(
        model=str(base), data=(str(data_dir),), out=str(tmp_path / "run"), steps=1, target_modules=("embed_tokens",)
    )
    train(told, sink=said.append)
    assert any("--merge" in getattr(event, "text", "") for event in said)


def test_a_model_without_template_takes_one_from_a_file(tmp_path: Path, data_dir: Path) -> None:
    from tests.checkpoints import CHATML

    base = write_checkpoint(
        tmp_path / "base", "llama", chat_template=None, overrides={"hidden_size": 64, "num_attention_heads": 4}
    )
    told = TrainSettings(model=str(base), data=(str(data_dir),), out=str(tmp_path / "run"), steps=1)
    with pytest.raises(UsageError, match="no chat template"):
        train(told)
    (tmp_path / "mine.jinja").write_text(CHATML)
    run = train(replace(told, chat_template=str(tmp_path / "mine.jinja")))
    assert (run.path / "chat_template.jinja").read_text() == CHATML


def test_bases_that_cannot_be_trained(tmp_path: Path, data_dir: Path, base_dir: Path) -> None:

    def attempt(model: Path) -> None:
        train(TrainSettings(model=str(model), data=(str(data_dir),), out=str(tmp_path / "run"), steps=1))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(base_dir, tmp_path / name))

    encoder = copy("encoder")
    edit_json(encoder / "config.json", architectures=["BertForMaskedLM"], model_type="bert")
    with pytest.raises(UnsupportedError, match="not a decoder"):
        attempt(encoder)
    unknown = copy("unknown")
    edit_json(unknown / "config.json", architectures=["WonderForCausalLM"], model_type="wonder")
    with pytest.raises(UnsupportedError, match="does not know"):
        attempt(unknown)
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickle"):
        attempt(pickled)
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        attempt(broken)
    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptFileError, match="truncated"):
        attempt(cut)
    wordless = copy("wordless")
    (wordless / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        attempt(wordless)
    garbled = copy("garbled")
    (garbled / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(CorruptFileError, match="tokenizer"):
        attempt(garbled)
    deeper = copy("deeper")
    edit_json(deeper / "config.json", num_hidden_layers=3)
    with pytest.raises(CorruptFileError, match="lacks"):
        attempt(deeper)
    with pytest.raises(UsageError, match="fits no module"):
        train(
            TrainSettings(
                model=str(base_dir), data=(str(data_dir),), out=str(tmp_path / "r"), steps=1, target_modules=("nope",)
            )
        )


def test_nothing_heavy_is_imported_before_the_data_are_checked(tmp_path: Path, base_dir: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    code = (
        "import sys; from edgetune.cli.main import run\n"
        f"code = run(['train', '-m', {str(base_dir)!r}, '-d', {str(tmp_path / 'bad.jsonl')!r}])\n"
        "print(int(code), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "bad.jsonl, line 1: expected one of" in done.stderr


@pytest.mark.parametrize("options", [{"rank": 100_000}, {"rank_pattern": {"q_proj": 100_000}}])
def test_a_rank_above_every_weights_own_is_refused(settings: TrainSettings, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is 100000, but no weight of the model has a rank above 64"):
        train(replace(settings, steps=1, **options))
    assert not Path(settings.out).exists()


@pytest.mark.parametrize("free", [1 << 10, 1 << 40])
def test_too_little_memory_is_warned_of_and_tried(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("edgetune.training.prepare"), "free_memory_bytes", lambda device: free)
    said: list[Event] = []
    assert train(replace(settings, steps=1, eval=False), sink=said.append).finished
    warned = any("Training may take about" in getattr(event, "text", "") for event in said)
    assert warned == (free == 1 << 10)
