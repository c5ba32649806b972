"""What a run says for itself: one page for every task, samples before and after, and no run lost for want of it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgetune.artifacts import Run
from edgetune.errors import InterruptedRun
from edgetune.events import Event, Metrics, Notice
from edgetune.training import TrainSettings, resume, train
from edgetune.training.curve import Line, chart_svg, histogram_svg
from edgetune.training.tasks import causal
from tests.checkpoints import write_checkpoint
from tests.task_models import write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ("fox", "dog", "quick", "brown", "lazy", "over", "the", "jumps")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture
def settings(decoder: Path, tmp_path: Path) -> TrainSettings:
    rows = [{"prompt": word * count, "completion": f" {word}!"} for word in WORDS for count in (1, 2, 3)]
    splits = {"train": [*rows, rows[0]], "valid": [rows[3], {"prompt": "foxfoxdog", "completion": " fox!"}]}
    return TrainSettings(
        model=str(decoder),
        data=(str(write_rows(tmp_path / "data", splits)),),
        task="completion",
        out=str(tmp_path / "run"),
        dtype="f32",
        lr=5e-3,
        rank=4,
        alpha=8,
        steps=3,
    )


class Page(HTMLParser):
    """The texts of a page by its headings, and everything it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.marked: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        links = [str(value) for name, value in attrs if name in ("src", "href")]
        self.loaded += [link for link in links if not link.startswith("#")]

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "h2" in self.open:
            self.sections[data] = ""
        elif "mark" in self.open:
            self.marked.append(data)
        self.sections[list(self.sections)[-1]] += f"{data} "


def page(run_dir: Path) -> Page:
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_the_page_of_a_text_run(settings: TrainSettings) -> None:
    run = train(replace(settings, epochs=12, steps=0, max_length=12))
    found = page(run.path)
    assert list(found.sections) == [
        *("", "Result", "Curves", "Samples", "What is learned", "Data", "Settings", "Environment")
    ]
    assert found.loaded == []
    assert "loss" in found.sections["Result"]
    for curve in ("loss", "learning rate", "gradient norm", "tokens a second", "memory in GB"):
        assert curve in found.sections["Curves"]
    assert "foxfoxdog" in found.sections["Samples"]
    assert " fox!" in found.marked[0] + found.marked[1] + found.marked[2]
    data = " ".join(found.sections["Data"].split())
    assert "rows 25 2" in data
    assert "repeat another row 1 –" in data
    assert "are training rows too – 1" in data
    assert "truncated" in data
    assert "torch" in found.sections["Environment"]
    assert "threads" in found.sections["Environment"]

    said = json.loads((run.path / "samples.json").read_text())
    assert [row["target"] for row in said["after"]] == [row["target"] for row in said["before"]]
    assert said["after"][1]["prompt"] == "foxfoxdog"
    assert [row["predicted"] for row in said["after"]] == [row["target"] for row in said["after"]]
    assert [row["predicted"] for row in said["before"]] != [row["target"] for row in said["before"]]


def test_the_page_of_a_classifier_and_of_preferences(settings: TrainSettings, tmp_path: Path) -> None:
    bert = write_model(tmp_path / "bert", "bert")
    rows = [{"text": f"the {word}", "label": label} for word, label in (("cat", "pet"), ("plum", "fruit"))]
    data = write_rows(tmp_path / "labelled", {"train": rows * 8, "valid": rows})
    run = train(replace(settings, model=str(bert), data=(str(data),), task="classification", out=str(tmp_path / "a")))
    found = page(run.path)
    assert "Confusion matrix" in found.sections
    assert "predicted before" in found.sections["Samples"]
    assert "accuracy" in found.sections["Curves"]
    assert found.marked == []

    pairs = [{"prompt": word, "chosen": f" {word}!", "rejected": " no"} for word in WORDS]
    data = write_rows(tmp_path / "pairs", {"train": pairs, "valid": pairs[:3]})
    run = train(replace(settings, data=(str(data),), task="dpo", lr=1e-5, out=str(tmp_path / "b")))
    found = page(run.path)
    assert "predicted after" in found.sections["Samples"]
    assert "reward_margin" in found.sections["Curves"]
    assert found.marked


def test_a_bare_text_is_gone_on_from_its_middle(settings: TrainSettings, tmp_path: Path) -> None:
    texts = [{"text": " ".join(WORDS * 3)}, {"text": " ".join(WORDS[::-1] * 3)}]
    data = write_rows(tmp_path / "texts", {"train": texts, "valid": texts})
    run = train(replace(settings, data=(str(data),), samples=1))
    (before,) = json.loads((run.path / "samples.json").read_text())["before"]
    assert len(before["prompt"]) > 20
    assert f"{before['prompt']} {before['target']}" in {row["text"] for row in texts}


def test_samples_that_take_too_long_stay_as_they_are(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(settings)
    monkeypatch.setattr(causal, "_SAMPLE_SECONDS", 0.0)
    cut = train(replace(settings, out=f"{settings.out}-cut"))
    texts = [json.loads((run.path / "samples.json").read_text())["before"][0]["predicted"] for run in (whole, cut)]
    assert len(texts[1]) < len(texts[0])
    assert texts[0].startswith(texts[1])


def test_what_rows_say_stays_text(settings: TrainSettings, tmp_path: Path) -> None:
    rows = [{"prompt": "</table><script>fox", "completion": "<b>fox</b>"}] * 2
    data = write_rows(tmp_path / "evil", {"train": rows, "valid": rows})
    run = train(replace(settings, data=(str(data),)))
    text = (run.path / "report.html").read_text()
    assert "<script" not in text
    assert "<b>fox" not in text
    assert "&lt;script" in text


def test_no_samples_are_written_where_none_are_wanted_or_possible(
    settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no cache here\nand more")

    monkeypatch.setattr(causal, "greedy", refuse)
    said: list[Event] = []
    run = train(settings, sink=said.append)
    assert "Samples" not in page(run.path).sections
    assert any(
        "does not write in training (no cache here)" in event.text for event in said if isinstance(event, Notice)
    )
    for name, options in (("none", {"samples": 0}), ("off", {"eval": False})):
        said.clear()
        run = train(replace(settings, out=str(tmp_path / name), **options), sink=said.append)
        assert not (run.path / "samples.json").exists()
        assert not [event for event in said if isinstance(event, Notice) and "no samples" in event.text]


def test_a_page_that_cannot_be_written_loses_nothing(settings: TrainSettings) -> None:
    said: list[Event] = []

    def sink(event: Event) -> None:
        said.append(event)
        if isinstance(event, Metrics) and event.step == 1:
            (Path(settings.out) / "report.html").mkdir(exist_ok=True)

    run = train(settings, sink=sink)
    assert Run.load(run.path).finished
    assert (run.path / "adapter_model.safetensors").is_file()
    warnings = [event.text for event in said if isinstance(event, Notice) and event.level == "warning"]
    assert any("report.html was not written" in text and "The run itself is whole" in text for text in warnings)


def test_a_stopped_run_has_a_page_and_the_resumed_one_its_samples(settings: TrainSettings) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Metrics) and event.split == "train" and event.step == 2 and not event.extra:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun):
        train(settings, sink=stop)
    run_dir = Path(settings.out)
    assert "not finished" in page(run_dir).sections[""]
    before = json.loads((run_dir / "samples.json").read_text())["before"]
    resume(run_dir)
    assert "not finished" not in page(run_dir).sections[""]
    said = json.loads((run_dir / "samples.json").read_text())
    assert said["before"] == before
    assert len(said["after"]) == len(before)


def test_charts_hold_what_they_are_given() -> None:
    chart = chart_svg([Line("a <b>", [(1.0, -2.0), (2.0, float("nan")), (3.0, 1.0)], measured=True)], title="&")
    circles = [node for node in ElementTree.fromstring(chart).iter() if node.tag.endswith("circle")]
    assert len(circles) == 2
    assert all(32 <= float(circle.attrib["cy"]) <= 220 for circle in circles)
    leap = [(float(step), 50.0 if step == 333 else 1.0) for step in range(1, 2000)]
    paths = [
        [float(part.split()[1]) for part in node.attrib["d"][1:].split("L")]
        for node in ElementTree.fromstring(chart_svg([Line("", leap, smooth=True)], title="")).iter()
        if node.attrib.get("class") in ("raw", "train")
    ]
    assert all(400 < len(heights) <= 601 for heights in paths)
    assert min(paths[0]) == 32.0  # seen, and not what the scale is made for
    assert 60 < paths[1][0] < 160
    bars = histogram_svg([1, 1, 30, 2048], [5], title="rows", across="tokens")
    tips = [node.text or "" for node in ElementTree.fromstring(bars).iter() if node.tag.endswith("title")]
    assert [int(tip.rpartition(" ")[2]) for tip in tips] == [3, 1, 1]
    ElementTree.fromstring(histogram_svg([], title="nothing", across="tokens"))
