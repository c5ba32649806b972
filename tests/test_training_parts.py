"""The parts of training by themselves: order, batches, loss, schedule, settings, curve, plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest

from edgetune.cli.dashboard import Dashboard, PlainLines, duration
from edgetune.cli.train import command as train_command
from edgetune.data import Tokenized
from edgetune.errors import UsageError
from edgetune.events import Metrics, Notice, Progress
from edgetune.plot import braille_plot
from edgetune.training import TrainSettings, merge_settings, read_recipe
from edgetune.training.batches import IGNORED, collate, epoch_batches
from edgetune.training.curve import loss_svg
from edgetune.training.loop import count_steps
from edgetune.training.schedule import Schedule, ScheduleName, count
from edgetune.training.settings import RECIPES, find_recipe


def sequence(length: int, learned_from: int, *, seed: int = 0) -> Tokenized:
    ids = np.random.default_rng(seed).integers(3, 60, length).astype(np.int32)
    return Tokenized(ids, np.arange(length) >= learned_from)


def tiny_model() -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_an_epoch_has_every_sequence_once_and_its_own_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 99, 101)]
    first = epoch_batches(lengths, batch_size=4, seed=1, epoch=0)
    assert sorted(index for batch in first for index in batch) == list(range(101))
    assert first == epoch_batches(lengths, batch_size=4, seed=1, epoch=0)
    assert first != epoch_batches(lengths, batch_size=4, seed=1, epoch=1)
    assert first != epoch_batches(lengths, batch_size=4, seed=2, epoch=0)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in first]
    assert np.mean(spread) < 10


def test_labels_are_the_next_learned_token() -> None:
    import torch

    one, other = sequence(5, 3), sequence(16, 0, seed=1)
    batch = collate([one, other], torch.device("cpu"))
    assert batch.labels[0].tolist() == [IGNORED, IGNORED, *one.ids[3:].tolist(), *[IGNORED] * 12]
    assert batch.labels[1].tolist() == [*other.ids[1:].tolist(), IGNORED]
    assert (batch.tokens, batch.learned_tokens) == (21, 17)
    assert collate([other], torch.device("cpu")).attention_mask is None


def test_the_loss_equals_transformers_own() -> None:
    import torch

    from edgetune.training.loss import summed_loss

    model, one = tiny_model(), sequence(20, 8)
    labels = torch.tensor(np.where(one.learned, one.ids, IGNORED)[None].astype(np.int64))
    ids = torch.tensor(one.ids[None].astype(np.int64))
    wanted = model(input_ids=ids, labels=labels).loss
    batch = collate([one, sequence(30, 30, seed=1)], torch.device("cpu"))
    torch.testing.assert_close(summed_loss(model, batch) / batch.learned_tokens, wanted)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    import torch

    from edgetune.training.loop import Loop
    from edgetune.training.tasks.causal import CausalTask

    rows = [sequence(10 + 3 * n, 2 + 2 * n, seed=n) for n in range(4)]
    model = tiny_model()
    loop = Loop(
        adapted=model,
        task=CausalTask("chat"),
        optimizer=None,
        train=rows,
        valid=[],
        settings=TrainSettings(),
        device=torch.device("cpu"),
        sink=lambda event: None,
        save=lambda position: None,
        keep_best=lambda position: None,
        should_stop=lambda: False,
    )
    # Nothing is frozen here, so no base dtype decides on autocast.
    model.lm_head.requires_grad_(False)
    gradients, losses = [], []
    for parts in ([rows], [rows[:1], rows[1:]], [[row] for row in rows]):
        model.zero_grad()
        losses.append(loop._backward_in_memory(parts)[1])
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_steps_and_learning_rate() -> None:
    assert count_steps(10, TrainSettings(batch_size=4, grad_accum=2, epochs=3)) == (2, 6)
    assert count_steps(10, TrainSettings(batch_size=4, steps=7)) == (3, 7)
    assert count_steps(100, TrainSettings(batch_size=1, epochs=0.5)) == (100, 50)
    assert (count(0.1, 50), count(7, 50), count(99, 50)) == (5, 7, 50)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("constant", "constant_with_warmup", {}),
        ("constant_with_warmup", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("polynomial", "polynomial", {"power": 2.0, "lr_end": 3e-4}),
        ("inverse_sqrt", "inverse_sqrt", {}),
        ("warmup_stable_decay", "warmup_stable_decay", {"num_decay_steps": 30, "min_lr_ratio": 0.1}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 20}),
    ],
)
def test_schedules_are_those_of_transformers(name: Any, theirs: str, options: dict[str, Any]) -> None:
    import torch
    from transformers import get_scheduler

    floor = options.get("min_lr_rate", options.get("min_lr_ratio", options.get("lr_end", 0.0) / 3e-3))
    settings = TrainSettings(
        schedule=name,
        lr=3e-3,
        warmup=0.1,
        decay=options.get("num_decay_steps", 0.2),
        min_lr_rate=floor,
        power=options.get("power", 1.0),
    )
    schedule = Schedule.of(settings, 100)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    other = get_scheduler(theirs, optimizer, 10, 100, scheduler_specific_kwargs=dict(options))
    expected = []
    for _ in range(100):
        expected.append(other.get_last_lr()[0])
        optimizer.step()
        other.step()
    found = [schedule.rate(step) for step in range(100)]
    assert found[10:] == pytest.approx(expected[10:], rel=1e-9)
    assert found[:9] == pytest.approx([3e-3 * (step + 1) / 10 for step in range(9)], rel=1e-9)
    assert max(found) == found[10] == 3e-3


def test_a_schedule_shorter_than_its_parts_still_ends() -> None:
    for name in get_args(ScheduleName):
        rates = [Schedule(name, 1.0, 3, warmup=2, decay=9).rate(step) for step in range(3)]
        assert rates[:2] == [0.5, 1.0]
        assert 0 < rates[2] <= 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0, expected at least 1"),
        ({"decay": 0.0}, "--decay is 0.0, expected more than 0"),
        ({"min_lr_rate": 1.0}, "--min-lr-rate is 1.0, expected at least 0 and less than 1"),
        ({"schedule": "steep"}, "schedule is 'steep', expected one of cosine, linear"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"dropout": 1.0}, "--dropout"),
        ({"schedule": "sine"}, "expected one of cosine, linear, constant"),
        ({"rank": "many"}, "rank is 'many', expected a whole number"),
        ({"rank_pattern": {"q": 0}}, "--rank-pattern"),
        ({"rank_pattern": {"q": True}}, "rank_pattern is"),
        ({"epochs": float("inf")}, "--epochs is inf, expected a number"),
        ({"warmup": float("nan")}, "--warmup is nan"),
        ({"alpha_pattern": {"q": float("inf")}}, "--alpha-pattern"),
        ({"seed": 1 << 63}, "--seed"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_settings(values, {})


def test_settings_survive_their_record() -> None:
    settings = TrainSettings(data=("a", "b"), rank_pattern={"q_proj": 4}, lr=1e-3)
    assert TrainSettings.from_record(settings.record()) == settings
    assert settings.differences(TrainSettings.from_record({**settings.record(), "out": "x"})) == []


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_that_comes_along_is_valid_and_explained(path: Path) -> None:
    values = read_recipe(find_recipe(path.stem))
    settings = merge_settings(values, {})
    chosen = settings.chosen()
    assert chosen
    assert set(chosen) <= set(values)
    # What needs the user's own files is not for a recipe to say.
    assert not {"model", "data", "out", "chat_template"} & set(values)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert f"--recipe {path.stem}" in lines[1]
    assert sum(line.startswith("#") for line in lines) > 2
    for name, value in values.items():
        other = {str: "", bool: not value}.get(type(value), 0.25)
        if isinstance(value, float | bool):
            assert getattr(merge_settings(values, {name: other}), name) == other
    (words,) = (getattr(option, "help", "") for option in train_command.params if option.name == "recipe")
    assert path.stem in words


def test_a_recipe_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no recipe 'chatt'") as caught:
        find_recipe("chatt")
    assert "Did you mean chat?" in str(caught.value.hint)
    assert find_recipe("chat").parent == RECIPES
    assert find_recipe("other/mine.toml") == Path("other/mine.toml")
    Path("mine").write_text("rank = 3\n", encoding="utf-8")
    assert read_recipe(find_recipe("mine")) == {"rank": 3}


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('model = "pocket"\ndata = "tickets"\nlr = 1\nbatch-size = 8\n[rank-pattern]\nq_proj = 4\n')
    recipe = read_recipe(path)
    assert recipe["data"] == (str(tmp_path / "tickets"),)
    other = tmp_path / "other.toml"
    other.write_text('data = ["~/a:2", "/b"]\n')
    assert read_recipe(other)["data"] == (str(Path("~/a:2").expanduser()), "/b")
    settings = merge_settings(recipe, {"batch_size": 2})
    assert (settings.model, settings.lr, settings.batch_size) == ("pocket", 1.0, 2)
    assert settings.rank_pattern == {"q_proj": 4}
    for text, message in (
        ("learning_rate = 1", "unknown setting 'learning_rate'"),
        ("[lora]\nrank = 8", "unknown setting 'lora'"),
        ("lr = 'x'", "lr is 'x' in .*recipe.toml, expected a number"),
        ("rank = 8.0", "rank is 8.0 in .*, expected a whole number"),
        ("packing = 1", "packing is 1 in .*, expected true or false"),
        ("data = 3", "data is 3 in .*, expected a list of texts"),
        ("rank-pattern = 3", "rank_pattern is 3 in .*, expected a table"),
        ("schedule = 'cosin'", "schedule is 'cosin' in .*, expected one of cosine, "),
        ("batch-size = 1\nbatch_size = 2", "has batch-size twice, the second time as 'batch_size'"),
        ("rank = 1\nlr = =\n", "cannot be read: .*line 2"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_recipe(path)


def test_the_curve_is_well_formed_svg() -> None:
    train = [(float(step), 3.0 / step) for step in range(1, 2000)]
    root = ElementTree.fromstring(loss_svg(train, [(0.0, 4.0), (1999.0, 0.5)], title="a <b> & c"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(loss_svg(train, [], title="x")) < 40_000
    ElementTree.fromstring(loss_svg([], [], title="nothing"))
    ElementTree.fromstring(loss_svg([(1.0, 0.0)], [], title="zero"))


def test_the_plot_falls_from_left_to_right() -> None:
    rows = braille_plot([float(n) for n in range(100, 0, -1)], columns=10, rows=3)
    assert [len(row) for row in rows] == [10, 10, 10]
    assert rows[0][0] != "\u2800"
    assert rows[0][-1] == "\u2800"
    assert rows[-1][-1] != "\u2800"


def step_events(step: int, total: int) -> list[Metrics | Progress]:
    values = {"loss": 2.0 / step, "lr": 1e-4, "epoch": 0.5, "tokens_per_second": 100.0, "memory_bytes": 1e9}
    return [Metrics(step, values), Progress("train", step, total, "steps")]


def test_the_dashboard_shows_the_numbers() -> None:
    from rich.console import Console

    board = Dashboard(clock=iter(range(1000)).__next__)
    console = Console(width=100, record=True, force_terminal=True)
    console.print(board.render(100))
    for event in (Metrics(0, {"loss": 3.5}, split="valid"), *step_events(1, 9), *step_events(2, 9)):
        board.take(event)
    console.print(board.render(100))
    text = console.export_text()
    for part in ("loading", "train 2/9 steps", "loss 1.5000", "valid 3.5000", "lr 1.0e-04", "1.0 GB", "left"):
        assert part in text


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    lines(Notice("look"))
    for step in range(1, 1001):
        for event in step_events(step, 1000):
            lines(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert 20 <= len(err.splitlines()) <= 23
    assert "step 1000/1000: loss 0.0020" in err
    assert duration(3725) == "1:02:05"
