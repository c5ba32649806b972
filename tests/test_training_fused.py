"""Fused LoRA and the fused head against PEFT and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest

from tests.speed_models import (
    PACKED,
    adapted_model,
    assert_same,
    base_model,
    gradients,
    packed_in_one,
    plain_loss,
    sequences,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_fused_lora_is_pefts_lora(lora: dict[str, Any]) -> None:
    from edgetune.training.fused_lora import fuse_lora

    model, rows = adapted_model(*PACKED["qwen2"], **lora), sequences()
    wanted = plain_loss(model, rows)
    wanted.backward()
    theirs = gradients(model)
    assert fuse_lora(model) == 14
    ours = plain_loss(model, rows)
    ours.backward()
    assert float(ours) == pytest.approx(float(wanted), rel=1e-6)
    assert_same(gradients(model), theirs)
    with model.disable_adapter():
        bare = float(plain_loss(model, rows))
    assert bare == pytest.approx(float(plain_loss(base_model(*PACKED["qwen2"]), rows)), rel=1e-6)
    assert abs(bare - float(ours)) > 0.1


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_that_is_not_plain_keeps_pefts_forward(lora: dict[str, Any]) -> None:
    from edgetune.training.fused_lora import fuse_lora

    assert fuse_lora(adapted_model(*PACKED["llama"], **lora)) == 0


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("qwen2-tied", {}),
        ("qwen2-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("gemma2", {"target_modules": ["q_proj", "lm_head"]}),
        ("granite", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("cohere", {"target_modules": ["q_proj", "lm_head"]}),
    ],
    ids=str,
)
def test_the_fused_head_has_the_gradients_of_plain_autograd(
    family: str, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.training import fused_loss
    from edgetune.training.loss import summed_loss

    # Chunks and blocks that do not divide the tokens.
    monkeypatch.setattr(fused_loss, "CHUNK", 7)
    monkeypatch.setattr(fused_loss, "_ROWS", 3)
    model, rows = adapted_model(*PACKED[family], **lora), sequences()
    assert fused_loss.find_head(model) is not None
    wanted = plain_loss(model, rows)
    (wanted / 3).backward()
    theirs = gradients(model)
    assert any("lm_head" in name for name in theirs) == ("lm_head" in str(lora))
    ours: Any = summed_loss(model, packed_in_one(model, rows))
    (ours / 3).backward()
    assert float(ours) == pytest.approx(float(wanted), rel=1e-6)
    assert_same(gradients(model), theirs, tolerance=2e-6)


def test_a_head_that_computes_something_else_is_not_fused() -> None:
    import torch

    from edgetune.training.fused_loss import find_head

    class Doubled(torch.nn.Linear):
        def forward(self, input: Any) -> Any:
            return 2 * super().forward(input)

    odd = base_model(*PACKED["llama"])
    odd.lm_head.__class__ = Doubled
    assert find_head(odd) is None
    scaled = base_model(*PACKED["llama"])
    scaled.config.logits_scaling = 3.0  # The config says so, the model does not.
    assert find_head(scaled) is None
    assert find_head(base_model(*PACKED["llama"])) is not None


def test_the_loss_is_measured_without_forming_gradients() -> None:
    import torch

    from edgetune.training.fused_loss import find_head

    model = base_model(*PACKED["llama"])
    head = find_head(model)
    assert head is not None
    hidden, labels = torch.randn(9, 32), torch.arange(9)
    with torch.no_grad():
        measured = head.summed_loss(hidden, labels)
    assert not measured.requires_grad
    wanted = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels, reduction="sum")
    torch.testing.assert_close(measured, wanted)
