"""What explain shows of GGUF encoders and encoder-decoders is what torch computes in the checkpoints they come from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.cli.main import run
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_run import explain_checkpoint
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import Explanation
from edgetune.export import export_adapter, export_base
from tests.encoders import ENCODERS, LABELS, write_encoder
from tests.seq2seq_checkpoints import write_seq2seq
from tests.test_engine_torch_seq2seq import write_lora

TEXT = "the quick brown fox jumps"
GREEDY = Sampling(temp=0.0, seed=1)


def assert_same_work(ours: Explanation, torch: Explanation, *, run: int = 0, atol: float = 2e-3) -> None:
    """The same tokens, states and attention in every stack."""
    for mine, other in zip(ours.runs[run].stacks, torch.runs[run].stacks, strict=True):
        assert [token.id for token in mine.tokens] == [token.id for token in other.tokens]
        assert [token.norm for token in mine.tokens] == pytest.approx([t.norm for t in other.tokens], rel=1e-3)
        assert len(mine.blocks) == len(other.blocks)
        # transformers hands out the last state behind the final norm, where there is one.
        for block, expected in list(zip(mine.blocks, other.blocks, strict=True))[:-1]:
            assert block.norm == pytest.approx(expected.norm, rel=1e-2)
        assert mine.attention is not None
        assert other.attention is not None
        np.testing.assert_allclose(mine.attention, other.attention, atol=atol)
        if other.cross_attention is not None:
            assert mine.cross_attention is not None
            np.testing.assert_allclose(mine.cross_attention, other.cross_attention, atol=atol)


def write_classifier(directory: Path, name: str, **overrides: Any) -> Path:
    write_encoder(directory / name, name, "ForSequenceClassification", overrides={**LABELS, **overrides})
    export_base(directory / name, directory / "model.gguf", outtype="f32")
    return directory / name


def torch_scores(model_dir: Path, ids: list[int], *, layers: int | None = None) -> list[float]:
    """Probabilities of `ids` by the first `layers` blocks and the head."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    if layers is not None:
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, torch.nn.ModuleList) and len(child) == ENCODERS["bert"][2]["num_hidden_layers"]:
                    setattr(module, name, child[:layers])
    with torch.no_grad():
        scores: list[float] = model(torch.tensor([ids])).logits.softmax(-1)[0].tolist()
    return scores


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_with_labels_is_followed_as_in_torch(name: str, tmp_path: Path) -> None:
    source = write_classifier(tmp_path, name)
    ours, torch = explain_gguf(tmp_path / "model.gguf", TEXT), explain_checkpoint(source, TEXT)
    assert not ours.notes
    assert_same_work(ours, torch)
    assert list(ours.runs[0].scores) == list(torch.runs[0].scores)
    assert list(ours.runs[0].scores.values()) == pytest.approx(list(torch.runs[0].scores.values()), abs=2e-3)
    assert all(block.attention_share for block in ours.runs[0].stacks[0].blocks)
    assert ours.anatomy.kind == "encoder"
    assert any(part.role.startswith("head") for part in ours.anatomy.stacks[0].head)
    assert "Pooling and head" in page(ours)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_after_every_block_it_says_what_a_shorter_model_says(name: str, tmp_path: Path) -> None:
    source = write_classifier(tmp_path, name)
    shown = explain_gguf(tmp_path / "model.gguf", TEXT).runs[0]
    ids = [token.id for token in shown.stacks[0].tokens]
    for number, block in enumerate(shown.stacks[0].blocks, 1):
        found = {guess.id: guess.probability for guess in block.lens.guesses}
        expected = torch_scores(source, ids, layers=number)
        assert [found[label] for label in range(3)] == pytest.approx(expected, abs=2e-3)


def test_a_tokens_doing_is_the_answer_with_it_less_the_answer_without(tmp_path: Path) -> None:
    source = write_classifier(tmp_path, "bert")
    shown = explain_gguf(tmp_path / "model.gguf", TEXT).runs[0]
    ids = [token.id for token in shown.stacks[0].tokens]
    whole = torch_scores(source, ids)
    best = int(np.argmax(whole))
    assert (shown.effects[0], shown.effects[-1]) == (0.0, 0.0)
    for place in (1, 3):
        without = torch_scores(source, [*ids[:place], *ids[place + 1 :]])
        assert shown.effects[place] == pytest.approx(whole[best] - without[best], abs=2e-3)


def test_a_sentence_model_ends_in_its_vector(tmp_path: Path) -> None:
    import torch
    import transformers

    write_encoder(tmp_path / "bert", "bert")
    export_base(tmp_path / "bert", tmp_path / "model.gguf", outtype="f32")
    shown = explain_gguf(tmp_path / "model.gguf", TEXT)
    ids = torch.tensor([[token.id for token in shown.runs[0].stacks[0].tokens]])
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
        mean = model(ids).last_hidden_state[0].mean(0)
    expected = (mean / mean.norm()).tolist()
    assert shown.runs[0].pooling == "mean"
    ours = np.array(shown.runs[0].vector) / np.linalg.norm(shown.runs[0].vector)
    assert ours.tolist() == pytest.approx(expected, abs=1e-3)
    assert not shown.runs[0].scores
    assert "The answer" in page(shown)


def write_head_adapter(directory: Path, base: Path, *, labels: int | None = None) -> Path:
    """PEFT's LoRA of queries and values; with `labels`, a head of so many."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **settings)
        kept: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]} if labels else {}
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], **kept))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) * (0.3 if "lora_" in name else 0.5))
        adapted.save_pretrained(directory)
    return directory


def test_an_encoders_base_and_adapter_stand_side_by_side(tmp_path: Path) -> None:
    source = write_classifier(tmp_path, "bert")
    adapter = write_head_adapter(tmp_path / "peft", source)
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=source, outtype="f32")
    ours = explain_gguf(tmp_path / "model.gguf", TEXT, lora=[LoraSpec(tmp_path / "lora.gguf")])
    torch = explain_checkpoint(source, TEXT, lora=[LoraSpec(adapter)])
    assert len(ours.runs) == 2
    for number in (0, 1):
        assert_same_work(ours, torch, run=number)
        mine, other = ours.runs[number].scores, torch.runs[number].scores
        assert list(mine.values()) == pytest.approx(list(other.values()), abs=2e-3)
    assert all(block.lens.kl_from_base for block in ours.runs[1].stacks[0].blocks)


def test_a_head_in_an_adapters_file_speaks_alone(tmp_path: Path) -> None:
    source = write_classifier(tmp_path, "bert")
    adapter = write_head_adapter(tmp_path / "peft", source, labels=2)
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=source, outtype="f32")
    shown = explain_gguf(tmp_path / "model.gguf", TEXT, lora=[LoraSpec(tmp_path / "lora.gguf")])
    assert len(shown.runs) == 1
    assert "head came with the adapter" in shown.notes[0]
    assert len(shown.runs[0].scores) == 2


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_t5_shows_both_sides_as_in_torch(name: str, tmp_path: Path) -> None:
    source = write_seq2seq(tmp_path / name, name)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    adapter = write_lora(tmp_path / "peft", source)
    export_adapter(adapter, tmp_path / "lora.gguf", base_dir=source, outtype="f32")
    lora = [LoraSpec(tmp_path / "lora.gguf")]
    ours = explain_gguf(tmp_path / "model.gguf", TEXT, lora=lora, sampling=GREEDY, steps=3)
    torch = explain_checkpoint(source, TEXT, lora=[LoraSpec(adapter)], sampling=GREEDY, steps=3)
    assert not ours.notes
    for number in (0, 1):
        assert_same_work(ours, torch, run=number, atol=5e-3)
        mine, other = ours.runs[number], torch.runs[number]
        assert mine.entropy == pytest.approx(other.entropy, abs=2e-2)
        decoder = zip(mine.stacks[1].blocks, other.stacks[1].blocks, strict=True)
        for block, expected in decoder:
            probabilities = {guess.id: guess.probability for guess in expected.lens.guesses}
            best = block.lens.guesses[0]
            assert best.probability == pytest.approx(probabilities[best.id], abs=5e-3)
            assert block.cross_share
        options = {option.id: option.probability for option in other.steps[0].options}
        first = mine.steps[0]
        assert first.probability == pytest.approx(options[first.id], abs=5e-3)
    assert "attention to the source adds" in page(ours)


def test_the_command_follows_files_of_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classifier(tmp_path, "bert")
    assert run(["explain", str(tmp_path / "model.gguf"), TEXT, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"][0]["scores"]) == 3
    assert run(["explain", str(tmp_path / "model.gguf"), TEXT]) == 0
    assert "6 The answer" in capsys.readouterr().out
    assert run(["explain", str(tmp_path / "model.gguf"), TEXT, "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert run(["explain", str(tmp_path / "model.gguf"), " "]) == 2
    assert "The prompt is empty" in capsys.readouterr().err
