"""TensorBoard, W&B and MLflow are told what is measured, by their own calls; one that fails never stops a run.

The packages need not be installed: modules with the same surface note what they are told.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from edgetune.artifacts import Run
from edgetune.errors import InterruptedRun, UsageError
from edgetune.events import Event, Metrics, Notice
from edgetune.training import TrainSettings, merge_settings, resume, train
from edgetune.training.reporters import REPORTERS
from tests.checkpoints import write_checkpoint
from tests.task_models import write_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> TrainSettings:
    rows = [{"prompt": word, "completion": f" {word}!"} for word in ("fox", "dog", "quick", "brown")]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows[:2]})
    return TrainSettings(
        model=str(base), data=(str(data),), out=str(tmp_path / "run"), dtype="f32", steps=3, rank=2, samples=0
    )


class Calls(list[tuple[str, Any]]):
    """What was called, with what."""

    def named(self, name: str) -> list[Any]:
        return [told for called, told in self if called == name]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Modules of the three packages' names, which note what they are told."""
    calls = Calls()

    def install(name: str, **attributes: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    class Writer:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            calls.append(("writer", (log_dir, purge_step)))

        def add_text(self, tag: str, text_string: str, global_step: int) -> None:
            calls.append(("text", tag))

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            calls.append(("scalar", (tag, scalar_value, global_step)))

        def close(self) -> None:
            calls.append(("close", None))

    class WandbRun:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("wandb metric", (name, step_metric)))

        def log(self, data: dict[str, float]) -> None:
            calls.append(("wandb log", data))

        def finish(self, exit_code: int) -> None:
            calls.append(("wandb finish", exit_code))

    def init(**options: Any) -> WandbRun:
        calls.append(("wandb init", options))
        return WandbRun()

    class MlflowClient:
        known: ClassVar[list[Any]] = []

        def __init__(self, tracking_uri: str) -> None:
            calls.append(("mlflow client", tracking_uri))

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
            calls.append(("experiment", (name, artifact_location)))
            return "1"

        def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> Any:
            calls.append(("mlflow run", (tags, run_name)))
            run = SimpleNamespace(info=SimpleNamespace(run_id="r"))
            self.known.append(run)
            return run

        def search_runs(self, experiment_ids: list[str], filter_string: str, max_results: int) -> list[Any]:
            calls.append(("search", filter_string))
            return self.known

        def update_run(self, run_id: str, status: str) -> None:
            calls.append(("update", (run_id, status)))

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            calls.append(("batch", (list(metrics), list(params))))

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.append(("terminated", (run_id, status)))

    install("tensorboard")
    install("torch.utils.tensorboard", SummaryWriter=Writer)
    install("wandb", init=init, Settings=lambda **options: options)
    entities = {"Metric": lambda *told: told, "Param": lambda *told: told}
    install("mlflow", MlflowClient=MlflowClient)
    install("mlflow.entities", **entities)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_all_three_are_told_every_measurement_and_stay_offline(settings: TrainSettings, calls: Calls) -> None:
    run = train(replace(settings, report_to=("tensorboard", "wandb", "mlflow"), eval_every=3))
    assert calls.named("writer") == [(str(run.path / "tensorboard"), None)]
    scalars = {(tag, step): value for tag, value, step in calls.named("scalar")}
    assert {step for tag, step in scalars if tag == "train/loss"} == {1, 2, 3}
    assert {step for tag, step in scalars if tag == "valid/loss"} == {0, 3}
    assert scalars["valid/loss", 3] == run.metrics["valid_loss"]
    assert calls.named("close") == [None]

    (options,) = calls.named("wandb init")
    assert (options["mode"], options["dir"], options["resume"]) == ("offline", str(run.path.resolve()), "allow")
    assert options["config"]["rank"] == 2
    logged = calls.named("wandb log")
    assert [data["step"] for data in logged if "train/loss" in data] == [1, 2, 3]
    assert ("*", "step") in calls.named("wandb metric")
    assert options["settings"]["console"] == "off"
    assert calls.named("wandb finish") == [0]

    assert calls.named("mlflow client") == [f"sqlite:///{run.path.resolve() / 'mlflow.db'}"]
    assert calls.named("experiment") == [("edgetune", (run.path.resolve() / "mlflow").as_uri())]
    metrics = [metric for told, _ in calls.named("batch") for metric in told]
    assert [(value, step) for name, value, _, step in metrics if name == "valid/loss"][-1] == (
        run.metrics["valid_loss"],
        3,
    )
    params = dict(param for _, told in calls.named("batch") for param in told)
    assert params["rank"] == "2"
    assert calls.named("terminated") == [("r", "FINISHED")]


def test_a_resumed_run_goes_on_where_it_was(settings: TrainSettings, calls: Calls) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == 2 and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)

    told = replace(settings, report_to=("tensorboard", "wandb", "mlflow"), eval=False)
    with pytest.raises(InterruptedRun):
        train(told, sink=stop)
    assert calls.named("wandb finish") == [1]
    assert calls.named("terminated") == [("r", "KILLED")]
    first = calls.named("wandb init")[0]["id"]
    calls.clear()
    run = resume(Path(settings.out))
    assert calls.named("writer") == [(str(run.path / "tensorboard"), 3)]
    assert [step for tag, _, step in calls.named("scalar") if tag == "train/loss"] == [3]
    assert calls.named("text") == []
    assert calls.named("wandb init")[0]["id"] == first
    assert calls.named("search") == [f"tags.`edgetune.created` = '{run.created}'"]
    assert calls.named("mlflow run") == []
    assert calls.named("update") == [("r", "RUNNING")]


def test_the_environment_names_other_places(
    settings: TrainSettings, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    train(replace(settings, report_to=("wandb", "mlflow")))
    assert calls.named("wandb init")[0]["mode"] == "disabled"
    assert calls.named("mlflow client") == ["http://127.0.0.1:5000"]
    assert calls.named("experiment") == [("edgetune", None)]


@pytest.mark.parametrize("where", ["start", "log", "end"])
def test_one_that_fails_is_told_of_and_left_out(
    settings: TrainSettings, calls: Calls, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyError("broken")

    wandb: Any = sys.modules["wandb"]
    if where == "start":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        run_class = type(wandb.init())
        monkeypatch.setattr(run_class, "log" if where == "log" else "finish", fail)
    said: list[Event] = []
    run = train(replace(settings, report_to=("wandb", "tensorboard")), sink=said.append)
    assert Run.load(run.path).finished
    warnings = [event.text for event in said if isinstance(event, Notice) and event.level == "warning"]
    assert [text for text in warnings if "wandb is told nothing more: 'broken'" in text]
    assert {step for tag, _, step in calls.named("scalar") if tag == "train/loss"} == {1, 2, 3}


def test_what_is_not_there_is_refused_before_anything_is_written(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="MLflow is not installed") as caught:
        train(replace(settings, report_to=("mlflow",)))
    assert caught.value.hint == "pip install mlflow"
    assert not Path(settings.out).exists()
    with pytest.raises(
        UsageError, match="report-to is 'tensorbord', expected one of tensorboard, wandb, mlflow"
    ) as other:
        merge_settings({"report_to": ["tensorbord"]}, {})
    assert other.value.hint == "Did you mean tensorboard?"


def test_another_package_adds_one(settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "lines-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "lines.py").write_text(
        "class Lines:\n"
        "    @classmethod\n"
        "    def check(cls): pass\n"
        "    def __init__(self, run, step): self.file = (run.path / 'lines.txt').open('w')\n"
        "    def log(self, step, split, values): print(split, step, file=self.file)\n"
        "    def end(self, finished): self.file.close()\n"
    )
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lines\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgetune.reporters]\nlines = lines:Lines\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    assert REPORTERS.names()[-1] == "lines"
    run = train(replace(settings, report_to=("lines",), eval=False))
    assert (run.path / "lines.txt").read_text().split() == ["train", "1", "train", "2", "train", "3"]
