"""What explain shows in torch of every kind of model: after each block, what a model of so many blocks would say."""

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
from edgetune.errors import CorruptFileError, UnsupportedError
from edgetune.explain.checkpoint_run import explain_checkpoint
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import Explanation
from edgetune.export import export_base
from tests.checkpoints import edit_json
from tests.encoders import ENCODERS, LABELS, write_encoder
from tests.ggufs import checkpoint
from tests.seq2seq_checkpoints import write_seq2seq

TEXT = "the quick brown fox jumps"
GREEDY = Sampling(temp=0.0, seed=1)


def shortened(model: Any, side: str, layers: int) -> Any:
    """`model` with the first `layers` blocks of its "encoder" or "decoder" side, or of the only one."""
    import torch

    for name, module in list(model.named_modules()):
        if side and side not in name.split("."):
            continue
        for child_name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len({type(one) for one in child}) == 1:
                setattr(module, child_name, child[:layers])
                return model
    raise AssertionError("no blocks")


def first_logits(model_dir: Path, auto: str, *, side: str = "", layers: int, **inputs: Any) -> Any:
    """Logits of the model with so many blocks, as a tensor (tokens, outputs), or (outputs,) of a head for texts."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, auto).from_pretrained(model_dir).eval()
    with torch.no_grad():
        return shortened(model, side, layers)(
            **{k: torch.tensor([v]) for k, v in inputs.items()}, use_cache=False
        ).logits[0]


def ids_of(shown: Explanation, stack: int = -1) -> list[int]:
    return [token.id for token in shown.runs[0].stacks[stack].tokens]


@pytest.mark.parametrize("family", ["bart", "mbart", "mbart50", "bert2bert", "t5", "flan-t5"])
def test_a_decoder_block_says_what_a_shorter_decoder_says(family: str, tmp_path: Path) -> None:
    source = write_seq2seq(tmp_path, family)
    shown = explain_checkpoint(source, TEXT, sampling=GREEDY, steps=2)
    assert not shown.notes
    for number, block in enumerate(shown.runs[0].stacks[1].blocks, 1):
        logits = first_logits(
            source, "AutoModelForSeq2SeqLM", side="decoder", layers=number,
            input_ids=ids_of(shown, 0), decoder_input_ids=ids_of(shown, 1),
        )  # fmt: skip
        assert_guesses(block.lens.guesses, logits[-1])
        best = shown.runs[0].stacks[1].blocks[number - 1].lens.by_token
        assert len(best) == len(ids_of(shown, 1))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3-moe"])
def test_a_block_says_what_a_shorter_model_says(family: str) -> None:
    source = checkpoint(family)
    shown = explain_checkpoint(source, TEXT, sampling=GREEDY, steps=1)
    logits = first_logits(source, "AutoModelForCausalLM", layers=1, input_ids=ids_of(shown))
    assert_guesses(shown.runs[0].stacks[0].blocks[0].lens.guesses, logits[-1])


def assert_guesses(guesses: Any, logits: Any, *, atol: float = 1e-4) -> None:
    shares = logits.softmax(-1).tolist()
    assert len(guesses) == min(5, len(shares))
    for guess in guesses:
        assert guess.probability == pytest.approx(shares[guess.id], abs=atol)
    assert guesses[0].id == int(np.argmax(shares))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_says_the_same_in_torch_and_in_llama_cpp(name: str, tmp_path: Path) -> None:
    source = write_encoder(tmp_path / name, name, "ForSequenceClassification", overrides=LABELS)
    export_base(source, tmp_path / "model.gguf", outtype="f32")
    torch, llama = explain_checkpoint(source, TEXT), explain_gguf(tmp_path / "model.gguf", TEXT)
    assert not torch.notes
    mine, other = torch.runs[0], llama.runs[0]
    assert (mine.pooling, list(mine.scores)) == (other.pooling, list(other.scores))
    assert list(mine.logits.values()) == pytest.approx(list(other.logits.values()), abs=5e-3)
    assert mine.effects == pytest.approx(other.effects, abs=5e-3)
    for block, expected in zip(mine.stacks[0].blocks, other.stacks[0].blocks, strict=True):
        assert block.norm == pytest.approx(expected.norm, rel=1e-2)
        assert block.attends_to == pytest.approx(expected.attends_to, abs=5e-3)
        found = {guess.id: guess.probability for guess in block.lens.guesses}
        for guess in expected.lens.guesses:
            assert found[guess.id] == pytest.approx(guess.probability, abs=5e-3)
    assert torch.anatomy.kind == llama.anatomy.kind == "encoder"


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", "single_label_classification"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_decoder_with_a_head_answers_after_every_block(family: str, problem: str, tmp_path: Path) -> None:
    import torch
    import transformers

    settings = {"num_labels": 1} if problem == "regression" else LABELS
    base = checkpoint(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.from_pretrained(base, problem_type=problem, **settings)
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, config=config)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path)
    for file in base.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shown = explain_checkpoint(tmp_path, TEXT)
    assert shown.runs[0].pooling == "last"
    assert shown.anatomy.stacks[0].name == shown.runs[0].stacks[0].name == "decoder"
    assert len(shown.runs[0].effects) == len(ids_of(shown))
    for number, block in enumerate(shown.runs[0].stacks[0].blocks, 1):
        logits = first_logits(tmp_path, "AutoModelForSequenceClassification", layers=number, input_ids=ids_of(shown))
        shares = {"regression": logits, "multi_label_classification": logits.sigmoid()}.get(problem, logits.softmax(-1))
        found = {guess.id: guess.probability for guess in block.lens.guesses}
        assert [found[label] for label in range(len(shares))] == pytest.approx(shares.tolist(), abs=1e-3)
    assert list(shown.runs[0].scores.values()) == pytest.approx(shares.tolist(), abs=1e-3)


def test_a_sentence_model_ends_in_its_vector(tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "bert", "bert")
    shown = explain_checkpoint(source, TEXT).runs[0]
    assert shown.pooling == "mean"
    assert len(shown.vector) == 96
    assert not shown.scores


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_a_model_that_fills_gaps_says_after_every_block_what_it_would_fill_in(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    source = write_encoder(tmp_path, name, "ForMaskedLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompt = f"the quick {tokenizer.mask_token} fox {tokenizer.mask_token}"
    shown = explain_checkpoint(source, prompt)
    assert not shown.notes
    ids = tokenizer(prompt).input_ids
    assert ids_of(shown) == ids
    assert shown.runs[0].gap == ids.index(tokenizer.mask_token_id)
    blocks = shown.runs[0].stacks[0].blocks
    assert len(blocks) == 3
    for number, block in enumerate(blocks, 1):
        logits = first_logits(source, "AutoModelForMaskedLM", layers=number, input_ids=ids)
        assert_guesses(block.lens.guesses, logits[shown.runs[0].gap])
        assert len(block.lens.by_token) == len(ids)
    assert "it would put" in page(shown)
    # Another control token's name is text, and without a gap the last word is told of.
    shown = explain_checkpoint(source, f"the fox {tokenizer.sep_token} jumps")
    assert ids_of(shown).count(tokenizer.sep_token_id) == 1
    assert shown.runs[0].gap == len(ids_of(shown)) - 2
    assert run(["explain", str(source), prompt]) == 0
    assert "it would put" in capsys.readouterr().out


def write_bottlenecks(directory: Path, base: Path) -> Path:
    """A Houlsby adapter whose layers are far from the identity."""
    import safetensors.torch
    import torch
    import transformers

    from edgetune.engine.torch.bottlenecks import add_bottlenecks, trained_parameters

    config = {"peft_type": "HOULSBY", "bottleneck": 8, "places": ["attention", "feed_forward"], "layer_norms": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_bottlenecks(model, config)
    torch.manual_seed(4)
    tensors = {name: torch.randn(one.shape) * 0.3 for name, one in trained_parameters(model, config).items()}
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_bottleneck_adapters_stand_beside_their_base(tmp_path: Path) -> None:
    from edgetune.engine.torch.engine import TorchEngine

    base = checkpoint("llama")
    lora = [LoraSpec(write_bottlenecks(tmp_path / "houlsby", base))]
    shown = explain_checkpoint(base, TEXT, lora=lora, sampling=GREEDY, steps=3)
    assert [one.name for one in shown.runs] == ["base", "houlsby"]
    plain = explain_checkpoint(base, TEXT, sampling=GREEDY, steps=3)
    assert shown.runs[0].steps == plain.runs[0].steps
    assert shown.anatomy.parameters == plain.anatomy.parameters
    with TorchEngine.open(base, dtype="f32", device="cpu", lora=lora) as engine:
        logits = engine.logits(ids_of(shown))[-1]
    shares = np.exp(logits - np.logaddexp.reduce(logits))
    for guess in shown.runs[1].stacks[0].blocks[-1].lens.guesses:
        assert guess.probability == pytest.approx(shares[guess.id], abs=1e-4)
    assert all(block.lens.kl_from_base for block in shown.runs[1].stacks[0].blocks)
    assert any(part.role == "adapter: down" for part in shown.anatomy.stacks[0].blocks[0])


def test_vectors_in_front_of_the_text_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft
    import transformers

    base = checkpoint("llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    assert run(["explain", str(base), TEXT, "--engine", "torch", "--lora", str(tmp_path)]) == 3
    assert "puts trained vectors in front of the text" in capsys.readouterr().err


def test_an_adapters_head_is_told_once_and_a_scaled_head_is_refused(tmp_path: Path) -> None:
    import peft
    import transformers

    base = write_encoder(tmp_path / "bert", "bert", "ForSequenceClassification", overrides=LABELS)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4, modules_to_save=["classifier"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    shown = explain_checkpoint(base, TEXT, lora=[LoraSpec(tmp_path / "peft")])
    assert len(shown.runs) == 2
    head = [part.name for part in shown.anatomy.stacks[0].head]
    assert head.count("classifier.weight") == 1
    assert not [name for name in head if "module" in name]
    with pytest.raises(UnsupportedError, match="cannot be scaled"):
        explain_checkpoint(base, TEXT, lora=[LoraSpec(tmp_path / "peft", 0.5)])


def test_a_model_that_lacks_weights_is_not_followed(tmp_path: Path) -> None:
    import safetensors.torch

    source = write_encoder(tmp_path, "bert", "ForMaskedLM")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"lacks 1 tensors .*layer\.1\.output\.dense\.weight"):
        explain_checkpoint(source, TEXT)


def test_labels_of_an_encoder_decoder_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seq2seq(tmp_path, "bart")
    edit_json(tmp_path / "config.json", architectures=["BartForSequenceClassification"])
    assert run(["explain", str(tmp_path), TEXT]) == 3
    assert "is an encoder-decoder with a head for labels" in capsys.readouterr().err
