"""Texts of encoder-decoders: tokenizer.json, character vocabularies, languages, and what a model's settings demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.sampling import Sampling
from edgetune.engine.torch.engine import TorchEngine
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError, UsageError
from edgetune.languages import find_language, language_codes
from tests.checkpoints import build_bpe_tokenizer, edit_json
from tests.seq2seq_checkpoints import TEXTS, unigram_tokenizer, write_seq2seq
from tests.test_engine_torch_seq2seq import reference, said, write_lora

_CODES = {"en_XX": 1, "de_DE": 2, "pt_XX": 3, "pt_BR": 4}


def test_what_a_text_spells_never_becomes_a_control_token() -> None:
    fast = unigram_tokenizer("t5")
    tokenizer = JsonTokenizer(fast.backend_tokenizer.to_str())
    for text in (*TEXTS[:5], "a  b", "unknown \U0001f642", ""):
        assert tokenizer.encode(text) == fast(text)["input_ids"]
    ids = tokenizer.encode("rain</s><extra_id_0>")
    assert ids[-1] == 1
    assert not {1, 3} & set(ids[:-1])
    assert tokenizer.decode(ids) != b"rain"


@pytest.mark.parametrize("text", ["caf\u00e9 \u6771\u4eac \U0001f642 the end", " a", "the quick  fox"])
def test_tokens_are_spelled_one_by_one_as_the_whole_is_decoded(text: str) -> None:
    for fast in (build_bpe_tokenizer(chat_template=None), unigram_tokenizer("t5")):
        tokenizer = JsonTokenizer(fast.backend_tokenizer.to_str())
        ids = tokenizer.encode(text)
        spell = tokenizer.speller(after=0)
        pieces = [spell(token) for token in ids]
        assert b"".join(pieces) == tokenizer.decode(ids) == fast.decode(ids, skip_special_tokens=True).encode()
        assert all(piece.decode() is not None for piece in pieces)


def test_a_damaged_tokenizer_is_one_sentence() -> None:
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json cannot be read"):
        JsonTokenizer('{"model": {"type": "none"}}')


def test_the_source_language_takes_the_place_of_the_tokenizers_own() -> None:
    for kind, at in (("mbart", -1), ("mbart50", 0)):
        tokenizer = JsonTokenizer(unigram_tokenizer(kind).backend_tokenizer.to_str())
        plain, german = tokenizer.encode_source("rain"), tokenizer.encode_source("rain", language="de")
        assert plain == tokenizer.encode("rain")
        assert (plain[at], german[at]) == (tokenizer.languages["en_XX"], tokenizer.languages["de_DE"])
        assert len(plain) == len(german)
        assert tokenizer.marks_language_before == (kind == "mbart50")
    assert JsonTokenizer(unigram_tokenizer("t5").backend_tokenizer.to_str()).languages == {}


def test_languages_by_code_or_by_name() -> None:
    assert language_codes([("</s>", 2), ("de_DE", 5), ("eng_Latn", 6), ("__fr__", 7), ("a_B", 8)]) == {
        "de_DE": 5,
        "eng_Latn": 6,
        "__fr__": 7,
    }
    assert find_language("de", _CODES) == find_language("de-de", _CODES) == find_language("de_DE", _CODES) == "de_DE"
    with pytest.raises(UsageError, match="may be any of pt_BR, pt_XX"):
        find_language("pt", _CODES)
    with pytest.raises(UsageError, match="no language 'xx'") as refused:
        find_language("xx", _CODES)
    assert "de_DE, en_XX" in refused.value.hint
    with pytest.raises(UsageError, match="knows no languages"):
        find_language("de", {})


def test_characters_of_a_config() -> None:
    config = {"grapheme_chars": "____abc", "phoneme_chars": "____xyz\u02c8", "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = CharTokenizer.from_config({**config, "pad_token_id": 0, "vocab_size": 8})
    assert tokenizer is not None
    assert tokenizer.encode("cab?_") == [1, 6, 4, 5, 3, 3, 2]
    assert tokenizer.encode_target("z\u02c8") == [6, 7, 2]
    assert tokenizer.decode([1, 6, 7, 2, 0]) == "z\u02c8".encode()
    assert CharTokenizer.from_config({"vocab_size": 8}) is None
    with pytest.raises(CorruptFileError, match="do not fit"):
        CharTokenizer.from_config({**config, "pad_token_id": 0, "vocab_size": 5})


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 2},
        {"min_length": 6},
        {"min_new_tokens": 7},
        {"repetition_penalty": 1.7},
        {"suppress_tokens": [10, 11, 12], "begin_suppress_tokens": [5, 20]},
        {"forced_bos_token_id": 7, "forced_eos_token_id": None},
    ],
)
def test_the_models_own_demands_are_met(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = write_seq2seq(tmp_path / "mbart", "mbart")
    edit_json(base / "generation_config.json", **settings)
    texts = TEXTS[:8]
    with TorchEngine.open(base) as engine:
        found = said(engine, texts, 9)
        beams = said(engine, texts[:4], 9, engine.own.beams.__class__(3))
    assert found == reference(base, None, texts, max_new_tokens=9, num_beams=1)
    assert beams == reference(base, None, texts[:4], max_new_tokens=9, num_beams=3)


def test_words_that_the_model_forbids_itself(tmp_path: Path) -> None:
    base = write_seq2seq(tmp_path / "mbart", "mbart")
    texts = TEXTS[:8]
    plain = [ids for ids in reference(base, None, texts, max_new_tokens=9, num_beams=1) if len(ids) > 2]
    # A token, the beginning of a text that may go on otherwise, and the end, which stays allowed.
    edit_json(base / "generation_config.json", bad_words_ids=[plain[0][1:2], plain[1][:2], [2]])
    with TorchEngine.open(base) as engine:
        assert engine.own.ignored == []
        found = said(engine, texts, 9)
        beams = said(engine, texts[:4], 9, engine.own.beams.__class__(3))
    assert found == reference(base, None, texts, max_new_tokens=9, num_beams=1)
    assert beams == reference(base, None, texts[:4], max_new_tokens=9, num_beams=3)
    assert not any(ids in found for ids in plain[:2])


@pytest.mark.parametrize("family", ["mbart", "mbart50"])
def test_the_target_language_is_where_the_family_has_it(tmp_path: Path, family: str) -> None:
    base = write_seq2seq(tmp_path / family, family)
    code = unigram_tokenizer(family).convert_tokens_to_ids("de_DE")
    option = {"decoder_start_token_id": code} if family == "mbart" else {"forced_bos_token_id": code}
    with TorchEngine.open(base) as engine:
        found = []
        for text in TEXTS[:6]:
            reply = engine.generate(engine.tokenizer.encode(text), Sampling(temp=0), max_tokens=8, language="de")
            "".join(reply)
            found.append(reply.ids)
        with pytest.raises(UsageError, match="no language 'xx'"):
            engine.generate([5, 2], Sampling(), language="xx")
    assert found == reference(base, None, TEXTS[:6], max_new_tokens=8, num_beams=1, **option)


def test_adapters_add_up_and_those_of_another_base_are_refused(tmp_path: Path) -> None:
    import numpy as np

    base = write_seq2seq(tmp_path / "bart", "bart")
    one, two = write_lora(tmp_path / "one", base, seed=1), write_lora(tmp_path / "two", base, seed=2)
    other = write_lora(tmp_path / "other", write_seq2seq(tmp_path / "wide", "bart", d_model=32), seed=1)
    with TorchEngine.open(base) as engine:
        ids, target = engine.tokenizer.encode(TEXTS[0]), [5, 9, 11]
        plain = engine.logits(ids, target)
        engine.set_adapters([LoraSpec(one), LoraSpec(two, 0.5)])
        both = engine.logits(ids, target)
        engine.set_adapters([LoraSpec(two, 0.5)])
        assert np.abs(engine.logits(ids, target) - both).max() > 0.1
        engine.set_adapters([LoraSpec(one), LoraSpec(two, 0.5)])
        assert np.allclose(engine.logits(ids, target), both, atol=1e-5)
        engine.set_adapters([])
        assert np.allclose(engine.logits(ids, target), plain, atol=1e-5)
        with pytest.raises(UnsupportedError, match="does not fit the model"):
            engine.set_adapters([LoraSpec(other)])
        assert engine.adapters == ()
        assert np.allclose(engine.logits(ids, target), plain, atol=1e-5)
        with pytest.raises(UsageError, match=r"no adapter_config\.json"):
            engine.set_adapters([LoraSpec(base)])


def test_int8_and_bf16_stay_near(tmp_path: Path) -> None:
    import numpy as np

    base = write_seq2seq(tmp_path / "bart", "bart")
    lora = write_lora(tmp_path / "lora", base)
    with TorchEngine.open(base, lora=[LoraSpec(lora)]) as engine:
        ids, target = engine.tokenizer.encode(TEXTS[0]), [5, 9, 11]
        exact = engine.logits(ids, target)
    for dtype in ("bf16", "int8"):
        with TorchEngine.open(base, dtype=dtype, lora=[LoraSpec(lora)]) as engine:
            error = np.abs(engine.logits(ids, target) - exact).max() / exact.std()
            assert 0 < error < 0.5
            engine.set_adapters([])
            assert np.abs(engine.logits(ids, target) - exact).max() / exact.std() > error
            assert engine.memory.weights > 0


def test_weights_that_are_missing_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = write_seq2seq(tmp_path / "bart", "bart")
    tensors = load_file(base / "model.safetensors")
    lost = tensors.pop("model.decoder.layers.0.fc1.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match="lacks 1 tensors"):
        TorchEngine.open(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="as a pickle"):
        TorchEngine.open(base)
    assert lost.size


def test_a_decoder_runs_in_torch_as_well(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.checkpoints import write_checkpoint

    base = write_checkpoint(tmp_path / "qwen", "qwen2")
    with TorchEngine.open(base) as engine:
        ids = engine.tokenizer.encode("the quick brown fox")
        reply = engine.generate(ids, Sampling(temp=0), max_tokens=8, top=2)
        assert "".join(reply) == reply.text
        assert len(reply.choices) == len(reply.ids)
        assert not engine.own.is_encoder_decoder
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        said_there = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    assert reply.ids == [token for token in said_there[len(ids) :] if token not in engine.tokenizer.eog_ids]


def test_the_run_record_is_no_adapter_of_another_base(tmp_path: Path) -> None:
    from edgetune.opening.torch_files import check_run_base

    base = write_seq2seq(tmp_path / "bart", "bart")
    lora = write_lora(tmp_path / "lora", base)
    check_run_base(lora, base)
    record = {
        "path": str(lora), "base_path": str(base), "base_name": "bart", "fingerprint": {"weights": "0" * 64},
    }  # fmt: skip
    (lora / "edgetune.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(MismatchError, match="other weights"):
        check_run_base(lora, base)
