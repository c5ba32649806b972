"""Every task end to end on small real models: what is learned and saved, resuming bit for bit, the best adapter."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifacts import Run
from edgetune.errors import UnsupportedError, UsageError
from edgetune.events import Event, Notice
from edgetune.training import TrainSettings, resume, train
from tests.forks import fork, train_and_die, wait
from tests.task_models import write_model, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")

COLOURS, THINGS = ("red", "blue", "green"), ("apple", "pear", "plum", "house", "tree")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
GERMAN = {"red": "rot", "blue": "blau", "house": "haus", "tree": "baum", "dog": "hund"}


def rows_of(task: str, count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def row() -> dict[str, Any]:
        colour, thing, number = draw.choice(COLOURS), draw.choice(THINGS), draw.choice(list(NUMBERS))
        if task == "classification":
            return {"text": f"the {colour} {thing} is {draw.choice(('slow', 'quick'))}", "label": colour}
        if task == "multi":
            chosen = draw.sample(COLOURS, draw.randint(0, 2))
            return {"text": f"the {' '.join(chosen)} {thing}", "labels": chosen}
        if task == "pairs":
            other = draw.choice(COLOURS)
            label = "same" if other == colour else "other"
            return {"sentence1": f"the {colour} {thing}", "sentence2": f"a {other} {thing}", "label": label}
        if task == "regression":
            return {"text": f"the {number} {thing} runs", "score": 100.0 + 10 * NUMBERS[number]}
        if task == "embedding":
            return {"anchor": f"the {colour} {thing}", "positive": f"{thing} is {colour}"}
        if task == "scored":
            other = draw.choice(COLOURS)
            close = 5.0 if other == colour else 0.5
            return {"sentence1": f"the {colour} {thing}", "sentence2": f"{thing} is {other}", "score": close}
        if task == "chat":
            told = [{"role": "user", "content": thing}, {"role": "assistant", "content": f"the {colour} {thing}"}]
            return {"messages": told}
        words = [draw.choice(("red", "blue")), draw.choice(("house", "tree", "dog"))]
        return {"en": " ".join(words), "de": " ".join(GERMAN[word] for word in words)}

    return [row() for _ in range(count)]


@pytest.fixture
def told(tmp_path: Path) -> Any:
    """Settings for a task on a base of a family, with data written for it."""

    def settings(kind: str, family: str, *, rows: int = 64, base: Path | None = None, **options: Any) -> TrainSettings:
        data = write_rows(tmp_path / f"data-{kind}", {"train": rows_of(kind, rows), "valid": rows_of(kind, 24, seed=1)})
        base = base or write_model(tmp_path / f"base-{family}", family)
        usual: dict[str, Any] = {
            "out": str(tmp_path / "run"),
            "dtype": "f32",
            "lr": 5e-3,
            "batch_size": 8,
            "steps": 4,
            "rank": 4,
            "alpha": 8.0,
        }
        return TrainSettings(model=str(base), data=(str(data),), **{**usual, **options})

    return settings


def predictions(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()]


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter_model.safetensors").read_bytes()


def peft_logits(run: Run, texts: list[Any], **config: Any) -> Any:
    """What transformers and PEFT alone make of the run, one text (or pair) at a time."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(run.base_path, **config)
    model = peft.PeftModel.from_pretrained(base, run.path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.base_path)
    types = {"return_token_type_ids": getattr(base.config, "type_vocab_size", 0) > 1}
    with torch.no_grad():
        return [model(**tokenizer(*text, return_tensors="pt", **types)).logits[0] for text in texts]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "xlm-roberta", "modernbert", "llama", "gpt2"])
def test_a_classifier_learns_and_is_what_peft_loads(told: Any, family: str) -> None:
    import torch

    settings = told("classification", family, steps=80, lr=1e-2, task="classification")
    run = train(settings)
    assert run.task == "classification"
    assert run.data["labels"] == ["blue", "green", "red"]
    assert run.data["multi_label"] is False
    assert run.metrics["valid"]["accuracy"] > 0.6 > run.metrics["valid_before"]["accuracy"]
    told_of = predictions(run.path)[:6]
    for row, logits in zip(told_of, peft_logits(run, [(row["text"],) for row in told_of], num_labels=3), strict=True):
        scores = [row["scores"][label] for label in run.data["labels"]]
        torch.testing.assert_close(logits.softmax(dim=0), torch.tensor(scores), atol=2e-5, rtol=0)
    assert (run.path / "confusion.svg").read_text().startswith("<svg ")
    assert "Confusion matrix" in (run.path / "report.html").read_text()


def test_a_pooler_the_base_lacks_is_trained_and_saved_and_one_it_has_is_left_alone(told: Any, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    bare = write_model(tmp_path / "mlm", "bert", head="BertForMaskedLM")
    found = {}
    for name, base in (("mlm", bare), ("bert", None)):
        run = train(told("classification", "bert", base=base, out=str(tmp_path / f"run-{name}")))
        found[name] = {key for key in load_file(run.path / "adapter_model.safetensors") if "pooler" in key}
    assert found["bert"] == set()
    prefix = "base_model.model.bert.pooler.dense"
    assert found["mlm"] == {f"{prefix}.weight", f"{prefix}.bias"}


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_batches_are_not_padded_beyond_the_models_positions(told: Any, family: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", family, overrides={"max_position_embeddings": 42})
    long = " ".join(["red apple house tree"] * 20)
    row = {"source": long, "target": long} if family == "bart" else {"text": long, "label": "a"}
    other = {"source": "cat", "target": "dog"} if family == "bart" else {"text": "cat", "label": "b"}
    data = write_rows(tmp_path / "data", {"train": [row, other] * 4})
    settings = told("multi", family, base=base, steps=2, batch_size=2)
    task = "seq2seq" if family == "bart" else "classification"
    assert train(replace(settings, data=(str(data),), task=task)).finished


def test_texts_in_pairs_are_told_apart(told: Any) -> None:
    import torch

    run = train(told("pairs", "bert", steps=30))
    assert run.task == "classification"
    row = predictions(run.path)[0]
    (logits,) = peft_logits(run, [(row["text_a"], row["text_b"])], num_labels=2)
    scores = torch.tensor([row["scores"][label] for label in run.data["labels"]])
    torch.testing.assert_close(logits.softmax(dim=0), scores, atol=2e-5, rtol=0)


def test_several_labels_a_row(told: Any) -> None:
    run = train(told("multi", "roberta", steps=60, class_weights="balanced"))
    assert run.data["multi_label"] is True
    assert run.metrics["valid"]["micro_f1"] > run.metrics["valid_before"]["micro_f1"]
    assert isinstance(predictions(run.path)[0]["predicted"], list)


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen2"])
def test_a_number_comes_in_the_scores_own_units(told: Any, family: str) -> None:
    run = train(told("regression", family, steps=40, task="regression"))
    assert run.metrics["valid"]["pearson"] > 0.5
    assert run.metrics["valid"]["mse"] < run.metrics["valid_before"]["mse"]
    rows = predictions(run.path)[:4]
    found = peft_logits(run, [(row["text"],) for row in rows], num_labels=1, problem_type="regression")
    assert [float(logits[0]) for logits in found] == pytest.approx([row["predicted"] for row in rows], abs=1e-2)
    assert 90 < float(found[0][0]) < 160


def test_a_base_that_is_a_classifier_with_these_labels_keeps_its_head(told: Any, tmp_path: Path) -> None:
    first = train(told("classification", "bert", steps=40, out=str(tmp_path / "first")))
    import peft
    import transformers

    labels = {"id2label": dict(enumerate(first.data["labels"])), "num_labels": 3}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(first.base_path, **labels)
    merged = peft.PeftModel.from_pretrained(base, first.path).merge_and_unload()
    merged.save_pretrained(tmp_path / "classifier")
    transformers.AutoTokenizer.from_pretrained(first.path).save_pretrained(tmp_path / "classifier")
    again = train(told("classification", "bert", base=tmp_path / "classifier", steps=1, lr=1e-6))
    assert again.metrics["valid_before"]["accuracy"] == first.metrics["valid"]["accuracy"]


@pytest.mark.parametrize(("family", "task"), [("bert", "embedding"), ("llama", "embedding"), ("roberta", "scored")])
def test_embeddings_come_closer(told: Any, family: str, task: str) -> None:
    run = train(told(task, family, steps=30, task="embedding", batch_size=12))
    metric = "spearman" if task == "scored" else "recall@1"
    assert run.metrics["valid"][metric] > run.metrics["valid_before"][metric]
    assert run.data["pooling"] == ("last" if family == "llama" else "mean")
    assert not any("pooler" in key for key in json.loads((run.path / "adapter_config.json").read_text()))


@pytest.mark.parametrize("family", ["t5", "bart", "mbart", "bert2bert"])
def test_texts_are_rewritten(told: Any, family: str) -> None:
    run = train(told("translation", family, steps=60, lr=2e-2, rank=8, alpha=32.0, src_lang="en", tgt_lang="de"))
    assert run.task == "seq2seq"
    assert run.metrics["valid"]["chrf"] > run.metrics["valid_before"]["chrf"] + 20
    assert list(run.metrics["valid"])[:2] == ["bleu", "chrf"]
    wanted = "translate English to German: " if family == "t5" else ""
    assert run.data["source_prefix"] == wanted


def test_what_the_decoder_reads_and_learns_is_transformers_own(told: Any) -> None:
    """The loss equals the one that the model computes of the same labels."""
    import torch
    import transformers

    from edgetune.training import prepare

    for family in ("t5", "bart", "mbart"):
        settings = told("translation", family, src_lang="en", tgt_lang="de")
        prepared = prepare(settings)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(settings.model).eval()
        batch = prepared.task.collate(prepared.train[:4], torch.device("cpu"))
        labels = batch.labels  # type: ignore[attr-defined]
        inputs = dict(batch.inputs)  # type: ignore[attr-defined]
        mine = prepared.task.summed_loss(model, batch) / batch.denominator
        start = inputs.pop("decoder_input_ids")[0, 0]
        if family == "mbart":
            assert prepared.tokenizer.backend.id_to_token(int(start)) == "de_DE"
            continue
        model.config.decoder_start_token_id = int(start)
        theirs = model(**inputs, labels=labels).loss
        torch.testing.assert_close(mine, theirs)


def test_replies_are_written_and_compared_where_asked(told: Any, tmp_path: Path) -> None:
    from tests.checkpoints import write_checkpoint

    base = write_checkpoint(
        tmp_path / "chat", "llama", overrides={"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    )
    run = train(told("chat", "", base=base, eval_texts=5, steps=2))
    assert len(predictions(run.path)) == 5
    assert set(run.metrics["valid"]) >= {"exact_match", "bleu", "rougeL"}
    assert next(iter(run.metrics["valid"])) == "exact_match"
    assert predictions(run.path)[0]["target"].startswith("the ")
    plain = train(told("chat", "", base=base, steps=2, out=str(tmp_path / "plain")))
    assert "valid" not in plain.metrics
    assert not (plain.path / "predictions.jsonl").exists()


CASES = [
    ("classification", "bert", {"metric": "accuracy", "eval_every": 2}),
    ("regression", "llama", {"task": "regression"}),
    ("embedding", "bert", {"grad_accum": 2}),
    ("translation", "t5", {"src_lang": "en", "tgt_lang": "de", "eval_texts": 4, "metric": "chrf"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family", "options"), CASES, ids=[case[0] for case in CASES])
def test_a_killed_run_resumes_to_the_very_same_adapter(
    told: Any, tmp_path: Path, task: str, family: str, options: dict[str, Any]
) -> None:
    settings = told(task, family, **{"steps": 9, "dropout": 0.2, "save_every": 3, "lr": 2e-2, **options})
    whole = train(replace(settings, out=str(tmp_path / "whole")))
    log = tmp_path / "log"
    assert wait(fork(train_and_die, settings.record(), 8, log=log)) == -signal.SIGKILL, log.read_text()
    resumed = resume(Path(settings.out))
    assert adapter_bytes(resumed.path) == adapter_bytes(whole.path)
    for name in ("valid", "valid_before", "best", "valid_loss"):
        assert resumed.metrics.get(name) == whole.metrics.get(name)
    assert (resumed.path / "predictions.jsonl").read_bytes() == (whole.path / "predictions.jsonl").read_bytes()


def test_the_best_adapter_is_kept_and_training_ends_when_it_gets_no_better(told: Any) -> None:
    said: list[Event] = []
    # A rate that ruins what was learned: the first measurement stays the best.
    settings = told(
        "classification",
        "bert",
        steps=40,
        lr=3.0,
        warmup=0,
        schedule="constant",
        metric="accuracy",
        eval_every=2,
        early_stopping=3,
    )
    run = train(settings, sink=said.append)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["accuracy"] for line in lines if line["split"] == "valid" and line["step"]}
    best = max(measured.values())
    assert run.metrics["valid"]["accuracy"] == best == run.metrics["best"]["value"]
    assert run.metrics["best"]["step"] == next(step for step, value in measured.items() if value == best)
    assert run.metrics["step"] == run.metrics["best"]["step"] + 3 * 2
    assert any("without a better accuracy" in event.text for event in said if isinstance(event, Notice))
    assert [row["label"] == row["predicted"] for row in predictions(run.path)].count(True) / 24 == best


@pytest.mark.parametrize(
    ("task", "family", "options", "error", "message"),
    [
        ("classification", "t5", {"task": "classification"}, UnsupportedError, "cannot be trained for classification"),
        (
            "translation",
            "bert",
            {"task": "seq2seq", "src_lang": "en", "tgt_lang": "de"},
            UnsupportedError,
            "an encoder",
        ),
        ("embedding", "bart", {"task": "embedding"}, UnsupportedError, "encoder-decoder"),
        ("chat", "bert", {}, UnsupportedError, "not a decoder that writes text"),
        ("classification", "llama", {}, UsageError, "could be for completion or classification"),
        ("scored", "bert", {}, UsageError, "could be for regression or embedding"),
        ("classification", "bert", {"metric": "bleu"}, UsageError, "is not measured for classification"),
        ("translation", "bart", {}, UsageError, "do not say which is to be translated into which"),
        ("translation", "mbart", {"src_lang": "en", "tgt_lang": "xx"}, UsageError, "no language 'xx'"),
        ("embedding", "bert", {"batch_size": 1}, UsageError, "--batch-size 1 has none"),
        ("classification", "bert", {"eval": False, "early_stopping": 1}, UsageError, "--eval is False"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_a_way_out(
    told: Any, task: str, family: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings = told(task, family, **options)
    with pytest.raises(error, match=message):
        train(settings)
    assert not Path(settings.out).exists()


def write_sentence_model(directory: Path, **pooling: Any) -> Path:
    """A BERT of width 32 with a pooling and a dense layer to 8."""
    import numpy as np
    from safetensors.numpy import save_file

    base = write_model(directory, "bert")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    (base / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in kinds.items()]))
    width = 32 * sum(pooling.values())
    for path, values in {
        "1_Pooling": {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": on for name, on in pooling.items()}},
        "2_Dense": {"in_features": width, "out_features": 8, "bias": False},
    }.items():
        (base / path).mkdir()
        (base / path / "config.json").write_text(json.dumps(values))
    weight = np.random.default_rng(0).standard_normal((8, width), dtype=np.float32)
    save_file({"linear.weight": weight / width**0.5}, base / "2_Dense" / "model.safetensors")
    return base


def test_a_sentence_models_dense_layer_is_computed_in_f32_beside_a_model_in_bf16(told: Any, tmp_path: Path) -> None:
    base = write_sentence_model(tmp_path / "sentences", cls_token=True)
    run = train(told("embedding", "bert", base=base, task="embedding", dtype="bf16"))
    assert run.metrics["valid"]["recall@5"] > 0


@pytest.mark.parametrize(
    ("pooling", "method", "options"),
    [
        ({"cls_token": True, "weightedmean_tokens": True}, "lora", {}),
        ({"cls_token": True}, "lora", {"pooling": "max"}),
        ({"mean_sqrt_len_tokens": True}, "full", {}),
        ({"cls_token": True}, "full", {"pooling": "max"}),
        ({}, "lora", {"pooling": "cls"}),
        ({}, "full", {"pooling": "cls"}),
    ],
)
def test_vectors_are_made_as_they_were_in_training(
    told: Any, tmp_path: Path, pooling: dict[str, bool], method: str, options: dict[str, Any]
) -> None:
    from edgetune.engine.torch.encoder import open_torch_encoder

    base = write_sentence_model(tmp_path / "base", **pooling) if pooling else write_model(tmp_path / "base", "bert")
    run = train(told("embedding", "bert", base=base, task="embedding", method=method, **options))
    is_whole = method == "full"
    with open_torch_encoder(run.path if is_whole else base, adapter_dir=None if is_whole else run.path) as encoder:
        for row in predictions(run.path)[:4]:
            first, second = encoder.embed([row["anchor"], row["positive"]], normalize=True)
            assert first @ second == pytest.approx(row["similarity"], abs=1e-4)
            assert first.shape == ((8,) if pooling else (32,))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_on_a_sentence_model_is_converted(told: Any, tmp_path: Path, method: str) -> None:
    from edgetune.conversion import convert

    base = write_sentence_model(tmp_path / "sentences", mean_tokens=True)
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    run = train(told("classification", "bert", base=base, task="classification", method=method))
    report = convert(run.path, tmp_path / "classifier.gguf").report
    assert report is not None
    assert report.passed
