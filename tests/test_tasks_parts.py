"""The parts of the tasks by themselves: rows, labels, metrics, pictures, the registry of other packages' tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from edgetune.data import load_tokenizer
from edgetune.data.columns import CLASSIFICATION, EMBEDDING, REGRESSION, REWRITING, languages, possible_tasks
from edgetune.data.dataset import read_columns
from edgetune.errors import DataError, EdgetuneError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, prepare, train
from edgetune.training import metrics as measure
from edgetune.training.confusion import confusion_svg
from edgetune.training.tasks.classification import sort_labels
from tests.encoders import write_tokenizer
from tests.task_models import write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "bert", "bert")


def settings(base: Path, data: Path, **options: Any) -> TrainSettings:
    return replace(TrainSettings(model=str(base), data=(str(data),), dtype="f32", steps=1), **options)


@pytest.mark.parametrize(
    ("row", "tasks"),
    [
        ({"text": "a", "label": "x"}, ["classification"]),
        ({"sentence": "a", "label": 1}, ["classification"]),
        ({"premise": "a", "hypothesis": "b", "label": True}, ["classification"]),
        ({"Text": "a", "Labels": ["x", "y"]}, ["classification"]),
        ({"text": "a", "score": 1.5}, ["regression"]),
        ({"text": "a", "label": 0.25}, ["regression"]),
        ({"text": "a", "label": "0.25"}, ["classification", "regression"]),
        ({"sentence1": "a", "sentence2": "b", "score": 3.0}, ["regression", "embedding"]),
        ({"anchor": "a", "positive": "b", "negative": "c"}, ["embedding"]),
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"]}, ["embedding"]),
        ({"source": "a", "target": "b"}, ["seq2seq"]),
        ({"article": "a", "highlights": "b", "id": "1"}, ["seq2seq"]),
        ({"question": "a", "context": "b", "answers": {"text": ["c"]}}, ["seq2seq"]),
        ({"question": "a", "answer": "b"}, ["embedding", "seq2seq"]),
        ({"translation": {"en": "a", "de": "b"}}, ["seq2seq"]),
        ({"en": "a", "de": "b"}, ["seq2seq"]),
        ({"messages": []}, []),
    ],
)
def test_columns_say_what_a_row_is_for(row: dict[str, Any], tasks: list[str]) -> None:
    assert possible_tasks(row) == tasks


def test_rows_become_examples() -> None:
    labelled = CLASSIFICATION[0]
    assert labelled.read({"text": "a", "label": True}).labels == ("true",)
    assert labelled.read({"text": "a", "label": 2.0}).labels == ("2",)
    assert labelled.read({"text": "a", "labels": '["x", "y", "x"]'}).labels == ("x", "y")
    assert labelled.read({"text": "a", "labels": []}).labels == ()
    assert REGRESSION[0].read({"text": "a", "score": "1e2"}).score == 100.0
    squad = REWRITING[0].read({"question": "q", "context": "c", "answers": {"text": ["a", "b"], "answer_start": [1]}})
    assert (squad.source, squad.target) == ("question: q context: c", "a")
    related = EMBEDDING[0].read({"query": "a", "pos": ["b"], "neg": ["c", "d"]})
    assert (related.anchor, related.positive, related.negatives) == ("a", "b", ("c", "d"))
    assert languages({"id": 1, "en": "a", "de": "b"}) == ["en", "de"]


@pytest.mark.parametrize(
    ("formats", "row", "message"),
    [
        (CLASSIFICATION, {"text": " ", "label": "x"}, "expected text in 'text', found only white space"),
        (CLASSIFICATION, {"text": "a", "label": ""}, "expected a label in 'label', found nothing"),
        (CLASSIFICATION, {"text": "a", "label": 0.5}, "--task regression"),
        (CLASSIFICATION, {"text": "a", "label": {"x": 1}}, "expected a label"),
        (REGRESSION, {"text": "a", "score": "high"}, "expected a number in 'score', found 'high'"),
        (REGRESSION, {"text": "a", "score": float("nan")}, "expected a finite number"),
        (REGRESSION, {"text": "a", "score": 1e300}, "expected a number that 32 bits hold"),
        (REGRESSION, {"text": "a", "score": True}, "expected a number in 'score', found a boolean"),
        (REWRITING, {"question": "q", "context": "c", "answers": {"text": []}}, "found an empty list"),
        (EMBEDDING, {"anchor": "a", "positive": []}, "found an empty list"),
        (EMBEDDING, {"text": "a"}, "expected related texts .* found the columns text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, formats: Any, row: dict[str, Any], message: str) -> None:
    data = write_rows(tmp_path, {"train": [row]})
    with pytest.raises(DataError, match=rf"train\.jsonl, line 1: .*{message}"):
        read_columns([data], formats, task="any")


def test_label_ids_are_the_same_every_time() -> None:
    assert sort_labels(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_labels(["b", "10", "a", "9"]) == ["10", "9", "a", "b"]


def test_labels_that_make_no_sense_are_refused(tmp_path: Path, bert: Path) -> None:
    def attempt(train_rows: list[dict[str, Any]], valid_rows: list[dict[str, Any]], **options: Any) -> list[Event]:
        said: list[Event] = []
        data = write_rows(tmp_path / "data", {"train": train_rows, "valid": valid_rows})
        prepare(settings(bert, data, **options), sink=said.append)
        return said

    red, blue = {"text": "the cat", "label": "red"}, {"text": "the dog", "label": "blue"}
    plum = {"text": "a house", "label": "plum"}
    with pytest.raises(DataError, match=r"valid\.jsonl, line 2: the label 'plum' is in no training row"):
        attempt([red, blue], [red, plum])
    said = attempt([red, blue], [red, plum], skip_bad_rows=True)
    assert any("2 labels: blue, red" in event.text for event in said if isinstance(event, Notice))
    with pytest.raises(DataError, match="nothing to tell apart"):
        attempt([red, red], [red])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: expected a list of labels"):
        attempt([{"text": "a", "labels": ["x"]}, {"text": "b", "labels": "y"}], [red])
    same = {"text": "the cat", "score": 1.0}
    with pytest.raises(DataError, match="nothing to tell apart"):
        attempt([same, same], [same])


def test_texts_over_the_limit_are_cut_and_counted_the_longer_of_a_pair_first(tmp_path: Path, bert: Path) -> None:
    long = {"sentence1": "the cat " * 30, "sentence2": "a dog", "label": "x"}
    short = {"sentence1": "the cat", "sentence2": "a dog", "label": "y"}
    said: list[Event] = []
    data = write_rows(tmp_path, {"train": [long, short]})
    prepared = prepare(settings(bert, data, max_length=12), sink=said.append)
    assert [len(sequence.ids) for sequence in prepared.train] == [12, 7]
    assert prepared.splits["train"].truncated == 1
    assert any("1 of 2 sequences cut at 12 tokens" in event.text for event in said if isinstance(event, Notice))
    sequence: Any = prepared.train[0]
    ends = [index for index, token in enumerate(sequence.ids) if token == sequence.ids[-1]]
    assert len(ends) == 2
    assert ends[1] - ends[0] == 3  # "a dog" and its end are whole
    assert sequence.type_ids.tolist() == [0] * (ends[0] + 1) + [1] * 3


def test_a_text_that_spells_a_control_token_stays_text(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": "the [SEP] cat", "label": "x"}, {"text": "dog", "label": "y"}]
    prepared = prepare(settings(bert, write_rows(tmp_path, {"train": rows})))
    end = prepared.train[0].ids[-1]
    assert prepared.train[0].ids.tolist().count(end) == 1


def test_metrics_are_the_libraries() -> None:
    values, confusion = measure.classification([0, 0, 1, 2], [0, 1, 1, 1], 3)
    assert values["accuracy"] == 0.5
    assert values["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    assert confusion == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    assert measure.correlations([1, 2, 3], [1, 1, 1]) == {"pearson": 0.0, "spearman": 0.0}
    assert measure.regression([1.0, 2.0], [2.0, 4.0])["mse"] == 2.5
    found = measure.texts(["the red house is here today"], ["A red house is here today."])
    assert found["exact_match"] == 1.0
    assert found["rougeL"] < 1.0
    assert measure.texts(["red house"], ["red dog"])["token_f1"] == 0.5
    scores = np.asarray([[0.9, 0.1, 0.5], [0.3, 0.2, 0.1]], dtype=np.float32)
    relevant = np.asarray([[True, False, False], [False, False, True]])
    ranked = measure.retrieval(scores, relevant)
    assert (ranked["recall@1"], ranked["recall@5"]) == (0.5, 1.0)
    assert ranked["ndcg@10"] == pytest.approx((1 + 1 / np.log2(4)) / 2)
    assert measure.balanced_weights([1, 3]) == pytest.approx([2.0, 2 / 3])


def test_rare_labels_weigh_as_much_as_frequent_ones(tmp_path: Path, bert: Path) -> None:
    import torch

    rows = [{"text": "the cat", "label": "often"}] * 6 + [{"text": "a dog", "label": "rarely"}] * 2
    data = write_rows(tmp_path, {"train": rows})
    for wanted, weights in (("balanced", [4 / 6, 2.0]), ("none", [1.0, 1.0])):
        prepared = prepare(settings(bert, data, class_weights=wanted))
        batch = prepared.task.collate([prepared.train[0], prepared.train[-1]], torch.device("cpu"))
        assert batch.extra["weights"].tolist() == pytest.approx(weights)  # type: ignore[attr-defined]
        assert batch.denominator == pytest.approx(sum(weights))


def test_texts_that_belong_together_are_no_negatives(tmp_path: Path, bert: Path) -> None:
    import torch

    rows = [
        {"anchor": "the cat", "positive": "red", "negative": "green"},
        {"anchor": "the cat", "positive": "blue"},
        {"anchor": "a dog", "positive": "red"},
    ]
    prepared = prepare(settings(bert, write_rows(tmp_path, {"train": rows})))
    related = prepared.task.collate(prepared.train, torch.device("cpu")).extra["related"]  # type: ignore[attr-defined]
    assert related.tolist() == [
        [False, True, True, False],
        [True, False, True, False],
        [True, False, False, False],
    ]


def test_pooling_comes_from_the_models_own_files(tmp_path: Path, bert: Path) -> None:
    import shutil

    model = Path(shutil.copytree(bert, tmp_path / "sentences"))
    data = write_rows(tmp_path / "data", {"train": [{"anchor": "the cat", "positive": "a dog"}] * 2})
    (model / "1_Pooling").mkdir()
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    assert prepare(settings(model, data)).data_record()["pooling"] == "cls"
    assert prepare(settings(model, data, pooling="mean")).data_record()["pooling"] == "mean"
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    prepared = prepare(settings(model, data))
    assert prepared.task.modes == ("weightedmean",)  # type: ignore[attr-defined]
    assert prepared.data_record()["pooling"] == ""
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode": "by chance"}')
    with pytest.raises(EdgetuneError, match="by chance"):
        prepare(settings(model, data))


def test_a_sentence_model_lower_cases_in_training_as_it_does_in_use(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "wordpiece", "Bert")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).encode("The FOX") != load_tokenizer(tmp_path).encode("the fox")
    (tmp_path / "modules.json").write_text('[{"path": "", "type": "Transformer"}]')
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert load_tokenizer(tmp_path).encode("The FOX") == load_tokenizer(tmp_path).encode("the fox")


def test_the_confusion_matrix_is_well_formed_whatever_labels_say() -> None:
    labels = ["<script>alert(1)</script>", 'a & "b"', "x" * 90]
    picture = confusion_svg([[3, 0, 0], [1, 2, 0], [0, 0, 0]], labels, title="a <b>")
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "<script" not in picture
    assert next(node.text for node in root.iter() if node.tag.endswith("title")) == labels[0]


def test_the_page_escapes_what_data_say(tmp_path: Path, bert: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    rows = [{"text": f"the cat {evil}", "label": evil}, {"text": "a dog", "label": "plain"}]
    data = write_rows(tmp_path / "data", {"train": rows, "valid": rows})
    run = train(settings(bert, data, out=str(tmp_path / "run")))
    page = (run.path / "report.html").read_text()
    assert "<img" not in page
    assert "&lt;img" in page
    assert "src=" not in page.replace("&lt;img src=x", "")
