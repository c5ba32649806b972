"""What makes training fast changes nothing: packed rows against one after another, transformers' loss curve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.errors import ResourceError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings
from edgetune.training.packed_kernels import LOOP
from edgetune.training.packing import ROW_STEP, PackedBatch, best_fit, collate_packed
from tests.checkpoints import write_checkpoint
from tests.speed_models import (
    PACKED,
    SHAPE,
    adapted_model,
    assert_same,
    gradients,
    plain_loss,
    sequences,
    speed_up,
)

pytestmark = pytest.mark.filterwarnings("ignore")

NOT_PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("BloomConfig", {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt-oss": (
        "GptOssConfig",
        {**SHAPE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}
"""Families that keep more than attention can cut: padded."""


@pytest.mark.parametrize("family", PACKED)
def test_a_packed_step_has_the_loss_and_gradient_of_its_sequences(family: str) -> None:
    from edgetune.training.loss import summed_loss

    model, rows = adapted_model(*PACKED[family]), sequences()
    wanted = plain_loss(model, rows)
    wanted.backward()
    theirs = gradients(model)
    assert len(theirs) > 8

    batches = speed_up(model, rows).batches([rows])
    assert all(isinstance(batch, PackedBatch) for batch in batches)
    assert len(batches) < len(rows)
    total = 0.0
    for batch in batches:
        loss: Any = summed_loss(model, batch)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(wanted), rel=2e-6)
    assert_same(gradients(model), theirs)


@pytest.mark.parametrize("family", NOT_PACKED)
def test_a_model_that_cannot_keep_packed_sequences_apart_is_padded(family: str) -> None:
    from edgetune.training.loss import summed_loss

    model, rows, told = (
        adapted_model(*NOT_PACKED[family], target_modules=r".*(in_proj|q_proj|key_value)"),
        sequences(),
        list[Event](),
    )
    wanted = plain_loss(model, rows)
    batches = speed_up(model, rows, told=told).batches([rows[:3], rows[3:]])
    assert len(batches) == 2
    assert not any(isinstance(batch, PackedBatch) for batch in batches)
    assert [event.text for event in told if isinstance(event, Notice)] == [
        "Sequences are padded, not packed: this model does not keep packed ones apart."
    ]
    assert sum(float(summed_loss(model, batch)) for batch in batches) == pytest.approx(float(wanted), rel=1e-5)


def test_attention_that_crosses_sequences_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.training import packing

    monkeypatch.setattr(packing, "_lengths", lambda lengths: __import__("torch").tensor([[[[sum(lengths)]]]]))
    model, rows, told = adapted_model(*PACKED["llama"]), sequences(), list[Event]()
    layout = speed_up(model, rows, told=told)
    assert told
    assert not any(isinstance(batch, PackedBatch) for batch in layout.batches([rows]))
    assert model.get_base_model().config._attn_implementation != LOOP.name


def test_packing_can_be_switched_off() -> None:
    model, rows, told = adapted_model(*PACKED["llama"]), sequences(), list[Event]()
    layout = speed_up(model, rows, told=told, packing=False)
    assert not told
    assert not any(isinstance(batch, PackedBatch) for batch in layout.batches([rows]))


def test_best_fit_wastes_little_and_splits_nothing() -> None:
    assert best_fit([5, 3, 2, 6, 4], 10) == [[3, 4], [0, 1, 2]]
    assert best_fit([20, 3], 10) == [[0], [1]]
    assert best_fit([], 10) == []
    lengths = np.random.default_rng(0).integers(1, 400, 300).tolist()
    rows = best_fit(lengths, 1024)
    assert sorted(index for row in rows for index in row) == list(range(300))
    assert all(sum(lengths[index] for index in row) <= 1024 for row in rows)
    assert len(rows) <= sum(lengths) / 1024 * 1.02 + 1


def test_a_row_has_restarting_positions_and_each_sequences_next_tokens() -> None:
    import torch

    one, other = sequences(2)
    row = collate_packed([one, other], torch.device("cpu"))
    first, second = len(one.ids), len(other.ids)
    assert row.attention_mask.flatten().tolist() == [first, second, ROW_STEP - first - second]
    assert row.position_ids[0, : first + 2].tolist() == [*range(first), 0, 1]
    assert (row.tokens, row.learned_tokens) == (first + second, int((row.labels >= 0).sum()))
    # The last token of a sequence predicts nothing: the next one is another sequence's.
    assert row.labels[0, first - 1] == row.labels[0, first + second - 1] == -100
    assert row.labels[0, first + second - 2] == other.ids[-1]


def test_a_layout_takes_less_memory_a_pass_until_nothing_is_left() -> None:
    rows = sequences(8)
    longest = max(len(row.ids) for row in rows)
    packed = speed_up(adapted_model(*PACKED["llama"]), rows, batch_size=8)
    padded = speed_up(adapted_model(*PACKED["llama"]), rows, batch_size=8, packing=False)
    for layout, smallest in ((packed, longest), (padded, 1)):
        passes = [len(layout.batches([rows]))]
        while told := layout.shrink():
            passes.append(len(layout.batches([rows])))
        assert passes == sorted(passes)
        assert passes[-1] > passes[0]
        assert layout.shrink() == told == ""
        learned = [batch.learned_tokens for batch in layout.batches([rows])]
        assert sum(learned) == sum(int(row.learned[1:].sum()) for row in rows)
        assert getattr(layout, "capacity", getattr(layout, "size", None)) == smallest


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_loss_curve_is_that_of_transformers_trainer_with_peft(packing: bool, tmp_path: Path) -> None:
    import json

    import peft
    import torch
    import transformers

    from edgetune.training import prepare, train
    from edgetune.training.batches import epoch_batches

    base_dir = write_checkpoint(tmp_path / "base", "qwen2", overrides={"hidden_size": 64, "intermediate_size": 128})
    texts = [f"the quick brown fox number {n} jumps" * (n % 5 + 1) for n in range(22)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = TrainSettings(
        model=str(base_dir), data=(str(tmp_path / "train.jsonl"),), out=str(tmp_path / "run"), dtype="f32",
        epochs=2, batch_size=4, lr=3e-3, warmup=0, packing=packing, eval=False,
    )  # fmt: skip
    run = train(settings)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    ours = [line["loss"] for line in lines if line["split"] == "train"]

    rows = prepare(settings).train
    # A "row" of the trainer's is one of our batches: the smaller one of an epoch need not be its last.
    places = [
        batch
        for epoch in range(2)
        for batch in epoch_batches([len(row.ids) for row in rows], batch_size=4, seed=0, epoch=epoch)
    ]
    torch.manual_seed(settings.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")

    def collate(indices: list[int]) -> dict[str, Any]:
        tensors = [torch.from_numpy(rows[index].ids.astype(np.int64)) for index in places[indices[0]]]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=0)
        labels = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(places)

    trainer = InOrder(
        model=peft.get_peft_model(base, config),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "trainer"), num_train_epochs=1, per_device_train_batch_size=1, use_cpu=True,
            learning_rate=3e-3, lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False,
        ),
        train_dataset=list(range(len(places))),
        data_collator=collate,
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == 12
    assert theirs[-1] < theirs[0] - 0.5
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_step_that_does_not_fit_goes_on_with_smaller_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from edgetune.training import loop, train

    base_dir = write_checkpoint(tmp_path / "base", "llama", overrides={"hidden_size": 64, "intermediate_size": 128})
    texts = [f"the quick brown fox number {n} jumps" * (n % 3 + 1) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = TrainSettings(
        model=str(base_dir), data=(str(tmp_path / "train.jsonl"),), dtype="f32", epochs=1, batch_size=8, eval=False
    )
    losses = [train(replace(settings, out=str(tmp_path / "whole"))).metrics["train_loss"]]

    real, most = loop.Loop._backward, [0]

    def backward(self: Any, batches: Any, denominator: float) -> float:
        if any(batch.input_ids.numel() > most[0] for batch in batches):
            real(self, batches[:1], denominator)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, batches, denominator)

    monkeypatch.setattr(loop.Loop, "_backward", backward)
    for packing, tokens in ((True, 200), (False, 160)):
        most[0] = tokens
        told: list[Event] = []
        out = str(tmp_path / f"less-{packing}")
        losses.append(train(replace(settings, out=out, packing=packing), sink=told.append).metrics["train_loss"])
        texts = [event.text for event in told if isinstance(event, Notice) and event.level == "warning"]
        assert any(text.startswith("Out of memory: going on with ") for text in texts), texts
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)

    most[0] = 1
    with pytest.raises(ResourceError, match="Out of memory"):
        train(replace(settings, out=str(tmp_path / "never")))


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma2", "gpt2"])
def test_a_model_that_packs_still_writes_what_it_wrote(family: str) -> None:
    import torch

    model, rows = adapted_model(*PACKED[family]).eval(), sequences()
    prompts = torch.from_numpy(np.stack([row.ids[:3] for row in rows[:2]]).astype(np.int64))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": 96}
    wanted = model.generate(input_ids=prompts, attention_mask=mask, **asked)
    speed_up(model, rows)
    assert model.get_base_model().config._attn_implementation == LOOP.name
    assert torch.equal(model.generate(input_ids=prompts, attention_mask=mask, **asked), wanted)
