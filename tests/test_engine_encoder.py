"""Texts to vectors and labels through llama.cpp and torch: the same numbers, in the order given, for pairs as well."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.cli.main import run
from edgetune.engine import open_encoder
from edgetune.engine.encoder import Encoder, Profile, with_adapter_heads
from edgetune.engine.encoder_llama import open_llama_encoder
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.torch.encoder import open_torch_encoder
from edgetune.errors import CorruptFileError, ExitCode, UnsupportedError, UsageError
from edgetune.events import Event, Progress
from edgetune.export import export_adapter, export_base
from edgetune.head import Head, HeadLayer
from edgetune.library import purpose_of
from tests.encoders import LABELS, furthest, write_encoder
from tests.ggufs import base_gguf
from tests.seq2seq_checkpoints import write_seq2seq

TEXTS = ["the quick brown fox", "hello", "a cafe, the fox played!", "x " * 70, "the " * 9, "Hello the fox"]
PAIRS = [("the quick fox", "played brown"), ("hello", "the cafe " * 20), ("a", "b")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine-encoder")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    return write_encoder(root / "bert", "bert", "ForSequenceClassification", overrides=LABELS)


@pytest.fixture(scope="module")
def gguf(root: Path, checkpoint: Path) -> Path:
    export_base(checkpoint, root / "bert.gguf", outtype="f16")
    return root / "bert.gguf"


@pytest.fixture(scope="module")
def llama(gguf: Path) -> Iterator[Encoder]:
    with open_encoder(gguf, threads=1) as encoder:
        yield encoder


@pytest.fixture(scope="module")
def torch_encoder(checkpoint: Path) -> Iterator[Encoder]:
    with open_encoder(checkpoint, dtype="f32") as encoder:
        yield encoder


@pytest.fixture(scope="module")
def hugging_face(checkpoint: Path) -> Any:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)

    def run(*texts: str) -> tuple[Any, Any]:
        import torch

        with torch.no_grad():
            out = model(**tokenizer(*texts, return_tensors="pt"), output_hidden_states=True)
        return out.hidden_states[-1][0].mean(0).numpy(), out.logits[0].softmax(-1).numpy()

    return run


def test_vectors_and_scores_are_those_of_transformers(
    llama: Encoder, torch_encoder: Encoder, hugging_face: Any
) -> None:
    expected = [hugging_face(text) for text in TEXTS]
    for encoder in (llama, torch_encoder):
        vectors = encoder.embed(TEXTS)
        assert furthest(np.stack([vector for vector, _ in expected]), vectors) < 1e-5
        for (_, scores), found in zip(expected, encoder.classify(TEXTS), strict=True):
            assert list(found.scores) == ["red", "green", "blue"]
            assert np.abs(scores - list(found.scores.values())).max() < 2e-3
            assert found.labels == (["red", "green", "blue"][int(scores.argmax())],)


def test_pairs_have_their_token_types(llama: Encoder, torch_encoder: Encoder, hugging_face: Any) -> None:
    expected = np.stack([hugging_face(*pair)[1] for pair in PAIRS])
    for encoder in (llama, torch_encoder):
        found = np.array([list(one.scores.values()) for one in encoder.classify(PAIRS)])
        assert np.abs(expected - found).max() < 2e-3
    joined = [" [SEP] ".join(pair) for pair in PAIRS]
    without = np.array([list(one.scores.values()) for one in llama.classify(joined)])
    assert np.abs(expected - without).max() > 2e-3


def test_what_a_text_gives_does_not_depend_on_its_neighbours(llama: Encoder) -> None:
    together = llama.embed([*TEXTS, *TEXTS[::-1]])
    alone = np.concatenate([llama.embed([text]) for text in TEXTS])
    assert np.allclose(together, np.concatenate([alone, alone[::-1]]), atol=2e-3)


def test_control_tokens_in_a_text_stay_text(llama: Encoder) -> None:
    (spelled,) = llama.token_ids(["the [SEP] fox"])
    (plain,) = llama.token_ids(["the fox"])
    assert list(spelled.ids).count(plain.ids[-1]) == 1


def test_a_text_over_the_limit_is_cut_counted_averaged_or_refused(gguf: Path) -> None:
    long = "the quick brown fox " * 100
    with open_llama_encoder(gguf, threads=1) as encoder:
        limit = encoder.profile.max_tokens
        assert len(encoder.token_ids([long])[0]) == limit
        cut = encoder.embed([long, "hello"])
        assert encoder.cut_texts == 1
        averaged = encoder.embed([long, "hello"], long="window")
        assert (encoder.cut_texts, encoder.windowed_texts) == (1, 1)
        assert np.allclose(cut[1], averaged[1], atol=2e-3)
        assert not np.allclose(cut[0], averaged[0], atol=2e-3)
        with pytest.raises(UsageError, match=f"Text 2 is longer than the {limit} tokens"):
            encoder.embed(["hello", long], long="error")
        with pytest.raises(UsageError, match="Only vectors"):
            encoder.classify([long], long="window")


def test_windows_weigh_by_their_tokens(llama: Encoder) -> None:
    words = ["the"] * (llama.profile.max_tokens - 2) + ["fox"] * 10
    (found,) = llama.embed([" ".join(words)], long="window")
    first, second = llama.embed([" ".join(words[:-10]), " ".join(words[-10:])])
    weight = llama.profile.max_tokens / (llama.profile.max_tokens + 12)
    assert np.allclose(found, weight * first + (1 - weight) * second, atol=5e-3)


def test_bad_questions_have_answers(llama: Encoder) -> None:
    with pytest.raises(UsageError, match="Text 2 of 3 is empty"):
        llama.embed(["a", " ", "b"])
    with pytest.raises(UsageError, match="no prompt 'query'"):
        llama.embed(["a"], prompt_name="query")
    assert llama.embed([]).shape == (0, llama.profile.hidden_size)


def test_progress_reaches_its_end(llama: Encoder) -> None:
    events: list[Event] = []
    llama.embed(TEXTS, sink=events.append)
    last = events[-1]
    assert isinstance(last, Progress)
    assert (last.done, last.total) == (len(TEXTS), len(TEXTS))


def test_normalizing_and_pooling_can_be_chosen(llama: Encoder) -> None:
    assert np.allclose(np.linalg.norm(llama.embed(TEXTS, normalize=True), axis=1), 1, atol=1e-5)
    rows = {how: llama.embed(TEXTS[:1], pooling=how)[0] for how in ("mean", "cls", "last", "max")}
    assert len({tuple(np.round(row, 4)) for row in rows.values()}) == 4
    assert (rows["max"] >= rows["mean"] - 1e-3).all()


@pytest.mark.parametrize(
    ("task", "problem"), [("regression", "regression"), ("multilabel", "multi_label_classification")]
)
def test_other_kinds_of_head(root: Path, task: str, problem: str) -> None:
    overrides = {"num_labels": 1} if task == "regression" else {**LABELS, "problem_type": problem}
    directory = write_encoder(root / task, "distilbert", "ForSequenceClassification", overrides=overrides)
    export_base(directory, root / f"{task}.gguf", outtype="f32")
    with open_encoder(directory, dtype="f32") as torch, open_encoder(root / f"{task}.gguf", threads=1) as llama:
        for mine, theirs in zip(torch.classify(TEXTS), llama.classify(TEXTS), strict=True):
            assert mine.labels == theirs.labels
            assert mine.values == pytest.approx(theirs.values, abs=2e-3)
            assert list(mine.scores.values()) == pytest.approx(list(theirs.scores.values()), abs=2e-3)
            assert bool(mine.values) == (task == "regression")


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    labels = {"id2label": {0: "same", 1: "same", 2: "other"}, "label2id": {"same": 1, "other": 2}}
    directory = write_encoder(tmp_path / "twins", "bert", "ForSequenceClassification", overrides=labels)
    with open_torch_encoder(directory) as encoder:
        (found,) = encoder.classify(["the fox"])
        assert list(found.scores) == ["same", "same (1)", "other"]
        assert sum(found.scores.values()) == pytest.approx(1, abs=1e-5)
        assert found.labels == (list(found.scores)[int(encoder.logits(["the fox"])[0].argmax())],)


def test_a_threshold_withholds_labels(llama: Encoder) -> None:
    best = max(max(one.scores.values()) for one in llama.classify(TEXTS))
    assert all(one.labels == () for one in llama.classify(TEXTS, threshold=min(1.0, best + 1e-3)))
    assert all(one.labels for one in llama.classify(TEXTS, threshold=0.0))


def test_a_decoder_makes_vectors_and_no_labels() -> None:
    import torch
    import transformers

    path = base_gguf("llama")
    with open_llama_encoder(path, threads=1, flash_attn="off") as encoder:
        assert (encoder.profile.is_encoder, encoder.profile.pooling) == (False, "last")
        with pytest.raises(UnsupportedError, match="no head"):
            encoder.classify(["a"])
        ids = [list(one.ids) for one in encoder.token_ids(["hello there", "x"])]
        found = encoder.embed(["hello there", "x"], normalize=False)
    from tests.ggufs import checkpoint

    model = transformers.AutoModel.from_pretrained(checkpoint("llama"), dtype=torch.float32).eval()
    for row, one in zip(found, ids, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([one])).last_hidden_state[0, -1].numpy()
        assert furthest(expected[None], row[None]) < 1e-5


@pytest.fixture(scope="module")
def adapter(root: Path, checkpoint: Path) -> Path:
    """PEFT's adapter of the query projections and the word embedding, with a head of two labels."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            checkpoint, num_labels=2, ignore_mismatched_sizes=True
        )
        config = LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        peft_model = get_peft_model(model, config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in peft_model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * (0.3 if "lora_" in name else 0.5))
        peft_model.save_pretrained(root / "adapter")
    return root / "adapter"


def test_an_adapter_brings_its_head_and_its_scale(root: Path, checkpoint: Path, gguf: Path, adapter: Path) -> None:
    export_adapter(adapter, root / "adapter.gguf", base_dir=checkpoint)
    with open_encoder(checkpoint, adapter_dir=adapter, dtype="f32") as torch:
        expected = np.array([list(one.scores.values()) for one in torch.classify([*TEXTS, *PAIRS])])
    with open_llama_encoder(gguf, lora=[LoraSpec(root / "adapter.gguf")], threads=1) as llama:
        found = np.array([list(one.scores.values()) for one in llama.classify([*TEXTS, *PAIRS])])
        vectors = llama.embed(TEXTS)
    assert expected.shape == (len(TEXTS) + len(PAIRS), 2)
    assert np.abs(expected - found).max() < 2e-3
    with open_llama_encoder(gguf, lora=[LoraSpec(root / "adapter.gguf", 0.0)], threads=1) as off:
        assert off.profile.head is not None
        assert len(off.profile.head.labels) == 3
        assert furthest(vectors, off.embed(TEXTS)) > 1e-3


def test_long_pairs_are_cut_as_hugging_face_cuts_them(checkpoint: Path, llama: Encoder) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    limit = llama.profile.max_tokens
    sizes = [(3, 500), (500, 3), (500, 500), (500, 501), (501, 500), (80, 500), (70, 90), (2, 2), (200, 78)]
    pairs = [("the " * first, "fox " * second) for first, second in sizes]
    for pair, found in zip(pairs, llama.token_ids(pairs), strict=True):
        expected = tokenizer(*pair, truncation=True, max_length=limit)
        assert (list(found.ids), list(found.types)) == (expected["input_ids"], expected["token_type_ids"])


def test_t5s_encoder_sees_the_whole_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    import transformers

    whole = write_seq2seq(tmp_path / "t5", "flan-t5")
    directory = tmp_path / "encoder"
    model = transformers.T5EncoderModel.from_pretrained(whole).eval()
    model.save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    tokenizer.save_pretrained(directory)
    export_base(directory, tmp_path / "model.gguf", outtype="f16")
    texts = ["the quick brown fox", "rain", "seven wizards mix potions"]
    with torch.inference_mode():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    expected = np.stack([one.mean(dim=0).numpy() for one in states])
    for path, options in ((tmp_path / "model.gguf", {"threads": 1}), (directory, {"dtype": "f32"})):
        with open_encoder(path, **options) as encoder:
            found = encoder.embed(texts, normalize=False)
        assert furthest(found, expected) < 1e-4
    assert purpose_of(directory, "checkpoint") == "embed"
    for path in (whole, write_seq2seq(tmp_path / "bart", "bart")):
        assert run(["embed", str(path), "rain", "--engine", "torch"]) == ExitCode.UNSUPPORTED
        assert "edgetune generate" in capsys.readouterr().err


def test_a_head_is_on_or_off_in_both_engines(root: Path, checkpoint: Path, gguf: Path, adapter: Path) -> None:
    export_adapter(adapter, root / "half.gguf", base_dir=checkpoint)
    told = []
    for scale in (0.5, -1.0):
        with pytest.raises(UnsupportedError, match="brings a head, which cannot be scaled") as llama:
            open_llama_encoder(gguf, lora=[LoraSpec(root / "half.gguf", scale)], threads=1)
        with pytest.raises(UnsupportedError, match="brings a head, which cannot be scaled") as torch:
            open_torch_encoder(checkpoint, adapter_dir=adapter, adapter_scale=scale)
        told.append({str(one.value).partition(" brings")[2] for one in (llama, torch)})
    assert [len(one) for one in told] == [1, 1]
    with pytest.raises(UnsupportedError, match="both bring a head"):
        open_llama_encoder(gguf, lora=[LoraSpec(root / "half.gguf"), LoraSpec(root / "half.gguf")], threads=1)


def test_an_adapter_without_a_head_counts_in_part_in_both_engines(root: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    base = write_encoder(root / "plain", "bert")
    model = get_peft_model(
        transformers.BertModel.from_pretrained(base), LoraConfig(r=4, target_modules=["query", "key"])
    )
    randomize_lora(model)
    model.save_pretrained(root / "lora")
    export_base(base, root / "plain.gguf", outtype="f32")
    export_adapter(root / "lora", root / "lora.gguf", base_dir=base, outtype="f32")
    vectors = {}
    for scale in (0.5, 1.0, -1.0):
        with open_torch_encoder(base, adapter_dir=root / "lora", adapter_scale=scale, dtype="f32") as torch:
            vectors[scale] = torch.embed(TEXTS)
        with open_llama_encoder(root / "plain.gguf", lora=[LoraSpec(root / "lora.gguf", scale)], threads=1) as llama:
            assert furthest(vectors[scale], llama.embed(TEXTS)) < 1e-4
    assert furthest(vectors[0.5], vectors[1.0]) > 1e-3
    assert run(["embed", str(base), "a fox", "--lora", f"{root / 'lora'}:0.5", "--engine", "torch"]) == ExitCode.OK


def randomize_lora(model: Any) -> None:
    """Nothing in the adapter stays zero."""
    import torch

    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)


@pytest.mark.parametrize("lost", ["bert.encoder.layer.1.output.dense.weight", "classifier.weight"])
def test_torch_makes_up_no_weights(tmp_path: Path, lost: str) -> None:
    from safetensors.numpy import load_file, save_file

    directory = write_encoder(tmp_path / "bert", "bert", "ForSequenceClassification", overrides=LABELS)
    tensors = load_file(directory / "model.safetensors")
    del tensors[lost]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=re.escape(lost.removeprefix("bert."))):
        open_encoder(directory)


def test_torch_needs_no_pooler_for_vectors(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "bert", "bert", "ForMaskedLM")
    with open_encoder(directory) as encoder:
        assert np.isfinite(encoder.embed(["the fox"])).all()


def test_an_adapter_that_pools_leaves_the_head_of_another(tmp_path: Path) -> None:
    layer = HeadLayer("dense", np.ones((2, 4), np.float32))
    scores, pools = Head("classification", ("a", "b"), layers=(layer,)), Head("embedding", pooling="cls")
    base = Profile(tmp_path, 4, 16, None, "mean", False)
    for heads in ([scores, pools], [pools, None, scores]):
        profile = with_adapter_heads(base, heads)
        assert (profile.head, profile.pooling) == (scores, "cls")


def test_a_head_that_another_converter_wrote_is_told_of(tmp_path: Path, root: Path) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    export_base(write_encoder(root / "headless", "bert"), root / "headless.gguf", outtype="f32")
    reader, writer = GGUFReader(root / "headless.gguf"), GGUFWriter(tmp_path / "foreign.gguf", "bert")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "edgetune.")):
            inner = {"sub_type": entry.types[-1]} if entry.types[0] == GGUFValueType.ARRAY else {}
            writer.add_key_value(name, entry.contents(), entry.types[0], **inner)
    writer.add_array("bert.classifier.output_labels", ["red", "green"])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.add_tensor("cls.output.weight", np.zeros((2, 96), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_encoder(tmp_path / "foreign.gguf", threads=1) as encoder:
        assert encoder.embed(TEXTS).shape == (len(TEXTS), 96)
        with pytest.raises(UnsupportedError, match=r"head in llama\.cpp's own form"):
            encoder.classify(TEXTS)
