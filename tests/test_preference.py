"""Preference tuning: losses and gradients against plain torch, any spreading over passes, resuming, refusals."""

from __future__ import annotations

import json
import math
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Event, Metrics, Notice
from edgetune.training import TrainSettings, prepare, resume, train
from edgetune.training.tasks import preference_losses as losses
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = ("dpo", "orpo", "simpo", "kto")
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


def pairs(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows in which the short answer is the better one."""
    draw = random.Random(seed)
    things = ["apple", "pear", "house", "tree", "dog", "cat"]
    return [
        {
            "prompt": f"Tell me of the {draw.choice(things)} and the {draw.choice(things)}",
            "chosen": f"yes the {draw.choice(things)}",
            "rejected": f"no I would not say so of a {draw.choice(things)}",
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), "llama", overrides=SMALL)


@pytest.fixture
def told(tmp_path: Path, base: Path) -> Any:
    def settings(task: str, **options: Any) -> TrainSettings:
        data = write_rows(tmp_path / "data", {"train": pairs(24), "valid": pairs(10, seed=1)})
        usual: dict[str, Any] = {"dtype": "f32", "lr": 5e-3, "rank": 4, "alpha": 8.0, "steps": 4}
        given = {"model": str(base), "data": (str(data),), "out": str(tmp_path / "run"), "task": task}
        return TrainSettings(**{**given, **usual, **options})

    return settings


def adapted_model(directory: Path, targets: Any, *, dropout: float = 0.0) -> Any:
    """The base with an adapter that says something, by transformers and PEFT alone."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.requires_grad_(False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, lora_dropout=dropout)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def plain_log_probability(model: Any, sequence: Any, *, skipped: int = 0) -> tuple[Any, int]:
    """log p of the learned tokens of one sequence, from whole logits, and how many there are.

    `skipped`: logits in front of the text's, of a trained prompt.
    """
    import torch

    ids = torch.tensor(sequence.ids[None].astype("int64"))
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, skipped:-1].float()
    every = logits.log_softmax(dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
    learned = torch.tensor(sequence.learned[1:])
    return every[learned].sum(), int(learned.sum())


def plain_loss(task: str, adapted: Any, base_model: Any, rows: Any, options: dict[str, Any]) -> Any:
    """The formulas of the papers, written out; the mean over the rows."""
    import torch
    from torch.nn.functional import logsigmoid

    total: Any = 0.0
    if task == "kto":
        gains, apart = [], []
        for row in rows:
            found = [plain_log_probability(model, row.whole)[0] for model in (adapted, base_model)]
            gains.append(found[0] - found[1].detach())
            found = [plain_log_probability(model, row.mismatched)[0].detach() for model in (adapted, base_model)]
            apart.append(found[0] - found[1])
        zero = torch.stack(apart).mean().clamp(min=0)
        for row, gain in zip(rows, gains, strict=True):
            if row.example.good:
                total = total + options.get("desirable_weight", 1) * (1 - torch.sigmoid(0.1 * (gain - zero)))
            else:
                total = total + options.get("undesirable_weight", 1) * (1 - torch.sigmoid(0.1 * (zero - gain)))
        return total / len(rows)
    for row in rows:
        (won, many), (lost, some) = (plain_log_probability(adapted, reply) for reply in (row.chosen, row.rejected))
        (base_won, _), (base_lost, _) = (
            plain_log_probability(base_model, reply) for reply in (row.chosen, row.rejected)
        )
        smooth = options.get("label_smoothing", 0.0)
        if task == "orpo":
            p, q = torch.exp(won / many), torch.exp(lost / some)
            ratio = torch.log(p / (1 - p)) - torch.log(q / (1 - q))
            total = total - won / many - 0.1 * logsigmoid(ratio)
        elif task == "simpo":
            margin = 2.0 * (won / many - lost / some) - 1.0
            total = total - (1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
        elif options.get("dpo_loss") == "ipo":
            delta = (won - base_won) / many - (lost - base_lost) / some
            total = total + (delta - 1 / (2 * 0.1)) ** 2
        else:
            margin = 0.1 * ((won - base_won) - (lost - base_lost))
            total = total - (1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
    return total / len(rows)


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dpo", "llama", {}),
    ("dpo", "gemma2", {"label_smoothing": 0.2}),
    ("dpo", "gpt2", {"dpo_loss": "ipo"}),
    ("orpo", "llama", {}),
    ("simpo", "llama", {"label_smoothing": 0.1}),
    ("kto", "llama", {"desirable_weight": 1.5, "undesirable_weight": 0.5}),
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("task", "family", "options"), CASES)
def test_loss_and_gradients_are_those_of_the_formula(
    told: Any, tmp_path: Path, base: Path, task: str, family: str, options: dict[str, Any], packed: bool
) -> None:
    import torch
    import transformers

    from edgetune.training.speed import speed_up

    directory = base
    if family != "llama":
        overrides = {"n_embd": 64, "resid_pdrop": 0.0} if family == "gpt2" else SMALL
        directory = write_checkpoint(tmp_path / "base", family, overrides=overrides)
    settings = told(task, model=str(directory), packing=packed, **options)
    prepared = prepare(settings)
    rows = list(prepared.train[:5])
    targets = ["q_proj", "down_proj", "lm_head"] if family == "llama" else "all-linear"
    adapted = adapted_model(directory, targets)
    plain_base = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    wanted = plain_loss(task, adapted, plain_base, rows, options)
    theirs = gradients(adapted, wanted)
    lengths = [len(row.ids) for row in rows]
    layout = speed_up(
        adapted, settings, prepared.task, lengths=lengths, max_length=512, device=torch.device("cpu"), sink=print
    )
    assert prepared.task.packed is packed  # type: ignore[attr-defined]
    (batch,) = replace(layout, size=5).batches([rows])  # type: ignore[type-var]
    loss = prepared.task.summed_loss(adapted, batch) / batch.denominator
    torch.testing.assert_close(loss, wanted, atol=2e-5, rtol=2e-5)
    ours = gradients(adapted, loss)
    assert set(ours) == set(theirs)
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    assert largest > 0
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, atol=2e-5 * max(1.0, largest), rtol=1e-3)


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo"])
def test_a_step_is_the_mean_over_its_pairs_however_they_are_spread(told: Any, base: Path, task: str) -> None:
    import torch

    prepared = prepare(told(task))
    adapted, kind, device = adapted_model(base, "all-linear"), prepared.task, torch.device("cpu")
    rows = prepared.train[:7]

    def loss(*parts: Any) -> Any:
        batches = [kind.collate(part, device) for part in parts]
        return sum(kind.summed_loss(adapted, batch) for batch in batches) / sum(b.denominator for b in batches)

    whole, spread = loss(rows), loss(rows[:1], rows[1:5], rows[5:])
    torch.testing.assert_close(spread, whole, atol=1e-6, rtol=1e-5)
    first, second = gradients(adapted, whole), gradients(adapted, spread)
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=1e-3)


def test_a_fresh_adapter_is_the_base_to_the_last_bit(told: Any) -> None:
    said: list[Event] = []
    run = train(told("dpo", steps=1), sink=said.append)
    before = run.metrics["valid_before"]
    assert run.metrics["valid_before_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["reward_margin"] == before["chosen_reward"] == 0.0
    assert before["reward_accuracy"] == 0.5  # nothing is preferred yet: chance
    assert any("is much for dpo" in event.text for event in said if isinstance(event, Notice))


@pytest.mark.parametrize("task", TASKS)
def test_the_better_reply_wins(told: Any, task: str) -> None:
    run = train(told(task, steps=20, batch_size=8))
    assert run.task == task
    before, after = run.metrics["valid_before"], run.metrics["valid"]
    assert after["reward_accuracy"] == 1.0
    assert after["reward_margin"] > before["reward_margin"]
    assert after["reward_margin"] == pytest.approx(after["chosen_reward"] - after["rejected_reward"])
    assert run.metrics["valid_loss"] < run.metrics["valid_before_loss"]
    rows = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    if task == "kto":
        assert {row["label"] for row in rows} == {True, False}
    else:
        assert all(row["chosen_reward"] > row["rejected_reward"] for row in rows)
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(run.base_path)
    assert peft.PeftModel.from_pretrained(model, run.path)


@pytest.mark.parametrize("task", TASKS)
def test_a_stopped_run_resumes_to_the_very_same_adapter(told: Any, tmp_path: Path, task: str) -> None:
    settings = told(task, steps=7, dropout=0.2, save_every=2, grad_accum=2, metric="reward_margin", eval_every=3)
    whole = train(replace(settings, out=str(tmp_path / "whole")))

    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == 6:
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        train(settings, sink=stop)
    resumed = resume(Path(settings.out))
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert resumed.metrics["valid"] == whole.metrics["valid"]
    assert resumed.metrics["best"] == whole.metrics["best"]


def test_dropout_does_not_touch_the_reference(told: Any, base: Path) -> None:
    """In training mode, with dropout in the adapter, the base's side is what it is in evaluation."""
    import torch

    from edgetune.training.tasks.preference_logps import score_base

    task = prepare(told("dpo")).task
    rows = prepare(told("dpo")).train[:3]
    adapted = adapted_model(base, "all-linear", dropout=0.5)
    batch = task.collate(rows, torch.device("cpu"))
    quiet = score_base(adapted, batch.replies).sums  # type: ignore[attr-defined]
    adapted.train()
    assert torch.equal(score_base(adapted, batch.replies).sums, quiet)  # type: ignore[attr-defined]
    assert adapted.training
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_replies_found_good_alone_can_be_learned(told: Any, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs(8)]
    data = write_rows(tmp_path / "good", {"train": rows, "valid": rows})
    run = train(told("auto", data=(str(data),)))
    assert run.task == "kto"
    assert set(run.metrics["valid"]) == {"chosen_reward"}


def test_one_reply_a_pass_is_little_for_kto_and_is_told(told: Any) -> None:
    said: list[Event] = []
    train(told("kto", steps=1, batch_size=1, eval=False), sink=said.append)
    assert any("--batch-size 1" in event.text for event in said if isinstance(event, Notice))


def test_texts_without_a_template(told: Any, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", "llama", overrides=SMALL, chat_template=None)
    run = train(told("dpo", model=str(bare)))
    assert run.metrics["valid"]["reward_margin"] != 0.0


@pytest.mark.parametrize(
    ("task", "options", "error", "message"),
    [
        ("dpo", {"method": "full"}, UnsupportedError, "dpo compares with the base"),
        ("kto", {"method": "houlsby"}, UnsupportedError, "kto compares with the base"),
        ("dpo", {"dpo_loss": "ipo", "label_smoothing": 0.1}, UsageError, "is not for --dpo-loss ipo"),
        ("dpo", {"label_smoothing": 0.5}, UsageError, "--label-smoothing is 0.5"),
        ("dpo", {"beta": -1.0}, UsageError, "--beta is -1.0"),
        ("kto", {"desirable_weight": 0.0, "undesirable_weight": 0.0}, UsageError, "both 0"),
        ("dpo", {"metric": "accuracy"}, UsageError, "is not measured for dpo, only loss, reward_accuracy"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    told: Any, task: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = told(task, **options)
    with pytest.raises(error, match=message):
        train(settings)
    assert not Path(settings.out).exists()


def test_odds_stay_numbers_where_the_model_is_certain() -> None:
    import torch

    chosen = torch.tensor([-1e-9, -60.0, -1e-4], requires_grad=True)
    loss = losses.orpo(chosen, torch.tensor([-5.0, -1e-9, -0.7]), weight=0.1)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_gguf_base_is_its_own_reference(told: Any, task: str) -> None:
    from tests.ggufs import base_gguf

    run = train(told(task, model=str(base_gguf())))
    assert run.metrics["valid_before"]["reward_margin"] == 0.0
    assert run.metrics["valid"]["reward_margin"] > 0.0


@pytest.mark.parametrize("task", ["dpo", "orpo", "simpo", "kto"])
def test_a_prompt_learns_preferences_and_is_judged_as_peft_runs_it(told: Any, base: Path, task: str) -> None:
    import peft
    import torch
    import transformers

    given = told(task, method="prompt", prompt_tokens=3, lr=5e-2, steps=12)
    run = train(given)
    assert run.metrics["valid_loss"] < run.metrics["valid_before_loss"]
    prepared = prepare(given)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    said = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [plain_log_probability(plain, _one(row)) for row in prepared.valid]
        prompted = peft.PeftModel.from_pretrained(plain, run.path).eval()
        for row, told_of_it, (sum_of_base, count) in zip(prepared.valid, said, found, strict=True):
            gained, _ = plain_log_probability(prompted, _one(row), skipped=3)
            expected = {"orpo": gained / count, "simpo": 2.0 * gained / count}.get(task, 0.1 * (gained - sum_of_base))
            reward = told_of_it["reward"] if task == "kto" else told_of_it["chosen_reward"]
            assert reward == pytest.approx(float(expected), abs=2e-4)


def _one(row: Any) -> Any:
    return row.whole if hasattr(row, "whole") else row.chosen


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_recomputed_activations_change_nothing(told: Any, tmp_path: Path, task: str) -> None:
    kept = train(told(task, steps=2, out=str(tmp_path / "kept")))
    again = train(told(task, steps=2, grad_checkpointing="on"))
    assert again.metrics["valid_loss"] == pytest.approx(kept.metrics["valid_loss"], abs=1e-6)
