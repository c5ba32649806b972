"""The engine's answers are the model's: cached or not, with whatever adapters, in batches of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.errors import (
    CorruptFileError,
    EdgetuneError,
    MismatchError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from tests.ggufs import QUERY, base_gguf, checkpoint, lora_gguf, write_lora

GREEDY = Sampling(temp=0, ignore_eos=True)


@pytest.fixture
def engine() -> Any:
    with LlamaEngine.open(base_gguf(), threads=1) as opened:
        yield opened


def continue_ids(engine: LlamaEngine, ids: list[int], count: int = 8) -> list[int]:
    generation = engine.generate(ids, GREEDY, max_tokens=count)
    list(generation)
    return generation.ids


def close(left: Any, right: Any) -> bool:
    return bool(np.abs(left - right).max() < 1e-3)


def test_logits_equal_torch(engine: LlamaEngine) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    ids = engine.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 8)
    assert len(ids) > 64
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    logits = engine.logits(ids)
    assert logits.shape == (len(ids), engine.tokenizer.n_vocab)
    assert logits.dtype == np.float32
    # llama.cpp keeps keys and values in f16.
    assert np.abs(logits - expected).max() < 0.05
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_greedy_generation_follows_the_logits(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("hello world")
    said = continue_ids(engine, ids, 6)
    logits = engine.logits([*ids, *said])
    assert [int(row.argmax()) for row in logits[len(ids) - 1 : -1]] == said


def test_only_new_tokens_are_evaluated(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("one two three four five six seven")
    first = engine.generate(ids, GREEDY, max_tokens=4)
    list(first)
    assert first.timings.reused_tokens == 0
    longer = [*ids, *first.ids, *engine.tokenizer.encode(" and then")]
    second = engine.generate(longer, GREEDY, max_tokens=4)
    list(second)
    # The last token sampled was never evaluated.
    assert second.timings.reused_tokens == len(ids) + 3
    same = engine.generate(longer, GREEDY, max_tokens=4)
    list(same)
    assert same.timings.reused_tokens == len(longer) - 1
    assert same.ids == second.ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_reuse_changes_nothing(family: str) -> None:
    if family != "llama":
        pytest.importorskip(f"converters.families.{family}", reason="no converter for it yet")
    with LlamaEngine.open(base_gguf(family), threads=1) as engine:
        # Longer than Gemma's sliding window, then back to a point behind it, then on from there.
        long = (engine.tokenizer.encode("the dog was here and there with them " * 30))[:200]
        for ids in (long, long[:150], long[:30], [*long[:100], 5, 6, 7], long, [*long, 5]):
            warm = continue_ids(engine, ids)
            engine.forget()
            assert continue_ids(engine, ids) == warm


def test_batches_of_any_size_agree(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("the dog was here " * 60)[:200]
    expected = continue_ids(engine, ids)
    with LlamaEngine.open(base_gguf(), threads=1, batch_size=16) as other:
        assert continue_ids(other, ids) == expected


def test_adapters_switch_there_and_back(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("hello world, the dog")
    plain = engine.logits(ids)
    said = continue_ids(engine, ids)
    engine.set_adapters([LoraSpec(lora_gguf(), 1.0)])
    assert engine.cached_tokens == 0
    adapted = engine.logits(ids)
    adapted_said = continue_ids(engine, ids)
    assert not close(adapted, plain)
    engine.set_adapters([(lora_gguf(), 0.5)])
    assert not close(engine.logits(ids), adapted)
    engine.set_adapters([])
    assert continue_ids(engine, ids) == said
    assert close(engine.logits(ids), plain)
    engine.set_adapters([LoraSpec(lora_gguf(), 1.0)])
    assert continue_ids(engine, ids) == adapted_said


def test_nothing_computed_under_another_adapter_is_reused(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("hello world, the dog was here and there")
    with LlamaEngine.open(base_gguf(), threads=1, lora=[LoraSpec(lora_gguf())]) as fresh:
        expected = continue_ids(fresh, ids)
    continue_ids(engine, ids)
    engine.set_adapters([LoraSpec(lora_gguf())])
    assert continue_ids(engine, ids) == expected
    engine.set_adapters([LoraSpec(lora_gguf())])
    again = engine.generate(ids, GREEDY, max_tokens=1)
    list(again)
    assert again.timings.reused_tokens == len(ids) - 1


def test_several_adapters_add_up(engine: LlamaEngine) -> None:
    ids = engine.tokenizer.encode("hello world, the dog")
    first, second = lora_gguf(), lora_gguf(seed=1)
    engine.set_adapters([(first, 0.5), (second, -0.25)])
    both = engine.logits(ids)
    engine.set_adapters([(second, -0.25), (first, 0.5)])
    assert close(engine.logits(ids), both)
    engine.set_adapters([(first, 0.5), (second, 0.0)])
    alone = engine.logits(ids)
    engine.set_adapters([(first, 0.5)])
    assert close(engine.logits(ids), alone)
    assert not close(alone, both)


def test_adapter_equals_the_formula(engine: LlamaEngine) -> None:
    import torch
    import transformers
    from gguf import GGUFReader

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(lora_gguf()).tensors}
    for layer in (0, 1):
        a, b = (tensors[f"blk.{layer}.attn_q.weight.lora_{side}"] for side in "ab")
        change = (b @ a).reshape(8, 16, 2, 256).transpose(1, 2).reshape(256, 256)
        model.model.layers[layer].self_attn.q_proj.weight.data += change
    ids = engine.tokenizer.encode("hello world, the dog was")
    engine.set_adapters([(lora_gguf(), 1.0)])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(engine.logits(ids) - expected).max() < 0.1


@pytest.mark.parametrize(
    ("shapes", "options", "error"),
    [
        ({"blk.0.attn_q.weight": (128, 256)}, {}, MismatchError),
        ({"blk.7.attn_q.weight": (256, 256)}, {}, MismatchError),
        (QUERY, {"architecture": "qwen2"}, MismatchError),
        (QUERY, {"half_of": "blk.0.attn_q.weight"}, CorruptFileError),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    engine: LlamaEngine, tmp_path: Path, shapes: Any, options: Any, error: type[EdgetuneError]
) -> None:
    path = write_lora(tmp_path / "bad.gguf", shapes, **options)
    ids = engine.tokenizer.encode("hello")
    before = continue_ids(engine, ids)
    with pytest.raises(error):
        engine.set_adapters([LoraSpec(path)])
    assert engine.adapters == ()
    assert continue_ids(engine, ids) == before


def test_an_adapter_on_a_tied_embedding_never_reaches_llama(tmp_path: Path) -> None:
    with LlamaEngine.open(base_gguf("llama-tied"), threads=1) as engine:
        path = write_lora(tmp_path / "embedding.gguf", {"token_embd.weight": (engine.tokenizer.n_vocab, 256)})
        with pytest.raises(UnsupportedError, match="embedding and as head"):
            engine.set_adapters([LoraSpec(path)])


def test_an_adapter_on_an_untied_embedding_works(engine: LlamaEngine, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "embedding.gguf", {"token_embd.weight": (engine.tokenizer.n_vocab, 256)})
    ids = engine.tokenizer.encode("hello")
    plain = engine.logits(ids)
    engine.set_adapters([LoraSpec(path)])
    assert not close(engine.logits(ids), plain)


def test_what_llama_would_leave_out_or_needs_more_than_a_switch_is_refused(engine: LlamaEngine, tmp_path: Path) -> None:
    activated = write_lora(tmp_path / "alora.gguf", QUERY, metadata={"adapter.alora.invocation_tokens": "1"})
    norm = write_lora(tmp_path / "norm.gguf", QUERY, extra={"blk.0.attn_norm.weight": (256,)})
    for path in (activated, norm):
        with pytest.raises(UnsupportedError):
            engine.set_adapters([LoraSpec(path)])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e30])
def test_scales_that_are_none_are_refused(engine: LlamaEngine, scale: float) -> None:
    with pytest.raises(UsageError, match="no scale"):
        engine.set_adapters([LoraSpec(lora_gguf(), scale)])
    assert engine.adapters == ()


def test_a_missing_adapter_or_a_model_as_adapter_is_refused(engine: LlamaEngine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        engine.set_adapters([LoraSpec(tmp_path / "nothing.gguf")])
    with pytest.raises(UsageError, match="not an adapter"):
        engine.set_adapters([LoraSpec(base_gguf())])


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf at all" * 10])
def test_files_that_are_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        LlamaEngine.open(path)


def test_a_truncated_file_and_an_adapter_are_refused(tmp_path: Path) -> None:
    whole = base_gguf().read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(CorruptFileError, match="truncated"):
        LlamaEngine.open(path)
    with pytest.raises(UnsupportedError, match="adapter"):
        LlamaEngine.open(lora_gguf())


def test_llama_says_why_it_cannot_load(tmp_path: Path) -> None:
    path = tmp_path / "strange.gguf"
    path.write_bytes(base_gguf().read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(UnsupportedError, match="unknown model architecture: 'lamma'"):
        LlamaEngine.open(path)


def test_a_context_that_cannot_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(ResourceError, match="free"):
        LlamaEngine.open(base_gguf(), ctx_size=2_000_000_000)


def test_the_context_is_the_models_own_unless_asked(engine: LlamaEngine) -> None:
    assert engine.context_size == engine.trained_context == 512
    with LlamaEngine.open(base_gguf(), threads=1, ctx_size=256) as small:
        assert small.context_size == 256


def test_texts_that_do_not_fit_are_refused(engine: LlamaEngine) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        engine.generate([], GREEDY)
    with pytest.raises(UsageError, match="512"):
        engine.generate([5] * 512, GREEDY)
    with pytest.raises(UsageError, match="vocabulary"):
        engine.logits([10**6])
    assert engine.logits([5] * 512).shape[0] == 512


@pytest.mark.parametrize("cache_type", ["q8_0", "f32"])
def test_cache_types(cache_type: Any) -> None:
    with LlamaEngine.open(
        base_gguf(), threads=1, cache_type_k=cache_type, cache_type_v=cache_type, flash_attn="on"
    ) as engine:
        assert len(continue_ids(engine, [5, 6, 7])) == 8


def test_llamas_log_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaEngine.open(base_gguf(), threads=1) as engine:
        continue_ids(engine, [5, 6])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    with LlamaEngine.open(base_gguf(), threads=1, verbose=True):
        pass
    assert "llama" in capfd.readouterr().err


def test_a_context_of_a_few_tokens_works_as_far_as_it_goes() -> None:
    with LlamaEngine.open(base_gguf(), threads=1, ctx_size=1) as engine:
        ids = [300 + number for number in range(min(8, engine.context_size - 1))]
        assert ids
        with LlamaEngine.open(base_gguf(), threads=1) as other:
            expected = continue_ids(other, ids, 4)
        assert continue_ids(engine, ids, 4) == expected[: engine.context_size - len(ids) + 1]
        assert engine.logits(ids).shape[0] == len(ids)


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    engine = LlamaEngine.open(base_gguf(), threads=1)
    continue_ids(engine, [300, 301])
    engine.close()
    engine.close()
    assert engine.distribution(GREEDY) == ()
    for use in (
        lambda: engine.generate([300], GREEDY),
        lambda: engine.logits([300]),
        lambda: engine.set_adapters([]),
        lambda: engine.save_state(tmp_path / "state"),
        lambda: engine.load_state(tmp_path / "state", [300]),
        lambda: engine.tokenizer.encode("never seen before"),
        lambda: engine.tokenizer.piece(299),
    ):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_quantized_values_want_flash_attention() -> None:
    with pytest.raises(UsageError, match="flash attention"):
        LlamaEngine.open(base_gguf(), threads=1, cache_type_v="q8_0", flash_attn="off")


def test_weights_that_are_no_numbers_are_noticed(tmp_path: Path) -> None:
    content = bytearray(base_gguf().read_bytes())
    content[-4096:] = b"\xff" * 4096
    path = tmp_path / "nan.gguf"
    path.write_bytes(content)
    with LlamaEngine.open(path, threads=1) as engine, pytest.raises(CorruptFileError, match="no number"):
        continue_ids(engine, [300, 301])
