"""Compiled layers learn what the others learn, and a machine that cannot compile says so once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.errors import UsageError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, train
from edgetune.training.model import ADAPTER_WEIGHTS
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


PARTS = ("q_proj", "down_proj")
"""One module of the attention and one of the MLP: of all seven, graphs take several times as long."""


def write_base(directory: Path, *, layers: int = 2) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": layers}
    return write_checkpoint(directory / "tiny", "llama", overrides=sizes)


def trained(base_dir: Path, run_dir: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    import safetensors.torch

    rows = [
        {"messages": [{"role": "user", "content": "fox " * n}, {"role": "assistant", "content": "dog " * n}]}
        for n in range(1, 9)
    ]
    data = run_dir.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told: list[Event] = []
    values = {"model": str(base_dir), "data": (str(data),), "out": str(run_dir), "steps": 3, "batch_size": 2}
    train(TrainSettings(**{**values, "rank": 2, "dtype": "f32", "eval": False, **changes}), sink=told.append)
    notices = [event.text for event in told if isinstance(event, Notice)]
    return safetensors.torch.load_file(run_dir / ADAPTER_WEIGHTS), notices


def test_without_a_compiler_a_run_is_as_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_dir = write_base(tmp_path)
    expected, _ = trained(base_dir, tmp_path / "plain")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    found, notices = trained(base_dir, tmp_path / "compiled", torch_compile=True)
    assert notices.count("The layers are not compiled: no compiler here.") == 1
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "layers", "options"),
    [
        # Graphs and their gradients are traced in both; code is made of the smaller ones alone, which takes long.
        ("inductor", 1, {"grad_checkpointing": "off"}),
        ("aot_eager", 2, {"grad_checkpointing": "on"}),
    ],
    ids=["one-layer", "checkpointing"],
)
def test_compiled_layers_learn_the_same(
    backend: str, layers: int, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_dir = write_base(tmp_path, layers=layers)
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend=backend, **how))
    expected, _ = trained(base_dir, tmp_path / "plain", target_modules=PARTS, **options)
    found, notices = trained(base_dir, tmp_path / "compiled", torch_compile=True, target_modules=PARTS, **options)
    if any("not compiled" in notice for notice in notices):
        pytest.skip(f"nothing can be compiled here: {notices}")
    assert found.keys() == expected.keys()
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    # Adam makes a step of every gradient, also of one that is nothing but rounding.
    apart = sum(float((found[name] - expected[name]).norm()) for name in expected)
    assert apart < 0.05 * sum(float(tensor.norm()) for tensor in expected.values())


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [values["loss"] for values in map(json.loads, lines) if "loss" in values]


def test_shared_layers_are_not_compiled() -> None:
    with pytest.raises(UsageError, match="--torch-compile"):
        TrainSettings(torch_compile=True, fsdp=True).check()
