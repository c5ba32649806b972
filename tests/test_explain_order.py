"""Parts of a torch model stand in the order of computation, as in a GGUF file, with what their norms are for."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from edgetune.cli.explain import command
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.explain.checkpoint_run import explain_checkpoint
from edgetune.explain.gguf_run import explain_gguf
from edgetune.explain.html import page
from edgetune.explain.page import Explanation, Stack
from edgetune.export import export_base
from tests.adapters import write_adapter
from tests.checkpoints import DECODERS, write_checkpoint
from tests.encoders import write_encoder
from tests.ggufs import base_gguf, checkpoint
from tests.seq2seq_checkpoints import write_seq2seq
from tests.test_sentence_transformers import WIDTH, Module, pooling, write_modules

GREEDY = Sampling(temp=0.0, seed=1)


def follow(path: Path, **options: object) -> Explanation:
    return explain_checkpoint(path, "the quick fox", sampling=GREEDY, steps=1, **options)  # type: ignore[arg-type]


def roles(stack: Stack) -> list[str]:
    return [part.role for part in stack.blocks[-1]]


@pytest.mark.parametrize("family", sorted({*DECODERS} - {"mixtral", "qwen3-moe"}))
def test_a_decoders_parts_stand_as_in_its_gguf(family: str) -> None:
    mine = follow(checkpoint(family)).anatomy.stacks[0]
    other = explain_gguf(base_gguf(family), "fox", sampling=GREEDY, steps=1).anatomy.stacks[0]
    told = sorted(zip(roles(mine), [part.shape for part in mine.blocks[-1]], strict=True))
    expected = sorted((part.role, part.shape) for part in other.blocks[-1])
    assert told == expected
    assert [role for role in roles(mine) if "norm before" in role or "norm after" in role] == [
        part.role for part in other.blocks[-1] if "norm before" in part.role or "norm after" in part.role
    ]
    assert roles(mine)[0] == "norm before attention"
    assert mine.head[0].role == "final norm"
    assert [part.role for part in mine.embedding] == [
        part.role for part in other.embedding if part.name != "rope_freqs.weight"
    ]


def test_experts_have_their_router() -> None:
    stack = follow(checkpoint("mixtral")).anatomy.stacks[0]
    assert roles(stack)[-4:] == ["norm before the MLP", "experts: router", "experts: gates and up", "experts: down"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bart", ["norm after attention", "norm after cross attention", "norm after the MLP"]),
        ("mbart", ["norm before attention", "norm before cross attention", "norm before the MLP"]),
        ("t5", ["norm before attention", "norm before cross attention", "norm before the MLP"]),
        ("bert2bert", ["norm after attention", "norm after cross attention", "norm after the MLP"]),
    ],
)
def test_norms_of_both_sides_and_the_table_that_they_share(family: str, expected: list[str], tmp_path: Path) -> None:
    encoder, decoder = follow(write_seq2seq(tmp_path / family, family)).anatomy.stacks
    assert [role for role in roles(decoder) if "norm" in role and "bias" not in role] == expected
    assert [role for role in roles(encoder) if "norm" in role and "bias" not in role] == [expected[0], expected[-1]]
    for stack in (encoder, decoder):
        assert "token embedding" in [part.role for part in stack.embedding]


def test_types_are_those_of_the_file_and_not_those_of_torch(tmp_path: Path) -> None:
    anatomy = follow(write_checkpoint(tmp_path / "one", "llama", dtype="bfloat16")).anatomy
    assert anatomy.file_type == "BF16"
    stack = anatomy.stacks[0]
    assert {part.type for parts in (stack.embedding, *stack.blocks, stack.head) for part in parts} == {"BF16"}


def test_types_of_a_file_that_has_several(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = write_checkpoint(tmp_path / "one", "llama")
    tensors = load_file(target / "model.safetensors")
    halves = {name: one if "norm" in name else one.half() for name, one in tensors.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    anatomy = follow(target).anatomy
    assert anatomy.file_type == "F16, F32"
    for part in (*anatomy.stacks[0].blocks[-1], *anatomy.stacks[0].head):
        assert part.type == ("F32" if "norm" in part.role else "F16"), part.name


def test_the_context_is_what_a_text_may_have(tmp_path: Path) -> None:
    # 160 rows, of which RoBERTa leaves those up to its padding token's id.
    assert follow(write_encoder(tmp_path / "one", "roberta", "ForMaskedLM")).anatomy.context == 158


def test_an_adapters_rank_stands_at_its_weight(tmp_path: Path) -> None:
    peft_dir = write_adapter(tmp_path / "peft", checkpoint("llama"), target_modules=["q_proj", "down_proj"])
    block = follow(checkpoint("llama"), lora=[LoraSpec(peft_dir)]).anatomy.stacks[0].blocks[0]
    assert [part.role for part in block if part.adapted] == ["attention: queries", "MLP: down"]
    assert block[0].role == "norm before attention"


def test_a_vector_that_is_normed_says_so_and_has_no_pooler(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "one", "bert")
    normalize: Module = ("Normalize", "2_Normalize", {}, {})
    write_modules(directory, [pooling(pooling_mode_mean_tokens=True, word_embedding_dimension=WIDTH), normalize])
    export_base(directory, tmp_path / "model.gguf", outtype="f32")
    torch, llama = explain_checkpoint(directory, "the fox"), explain_gguf(tmp_path / "model.gguf", "the fox")
    for shown in (torch, llama):
        assert shown.runs[0].is_normalized
        assert sum(value**2 for value in shown.runs[0].vector) == pytest.approx(1, abs=1e-4)
        assert not any("pooler" in part.name for part in shown.anatomy.stacks[0].head)
        assert "brought to length 1" in page(shown)


def test_a_model_that_fills_gaps_has_a_head_and_no_pooling(tmp_path: Path) -> None:
    source = write_encoder(tmp_path / "one", "bert", "ForMaskedLM")
    result = CliRunner().invoke(command, [str(source), "the [MASK] fox"])
    assert result.exit_code == 0, result.output
    assert "Each token's 96 numbers become one score for each of" in result.stdout
    assert "6 The gap" in result.stdout
    assert "Pooling" not in result.stdout
    assert "stand for each token" in page(explain_checkpoint(source, "the [MASK] fox"))
