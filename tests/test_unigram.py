"""Unigram vocabularies: the tokenizer in the GGUF gives transformers' ids, and no text becomes a control token."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CorruptCheckpoint, UnsupportedModel
from converters.vocab import read_vocabulary
from converters.vocab.huggingface import HUGGINGFACE_KEY
from converters.vocab.tokens import TokenType
from edgetune.data import load_tokenizer
from edgetune.engine.json_tokenizer import JsonTokenizer
from edgetune.parity.texts import random_texts
from tests.encoder_decoders import write_unigram

SIZE = 400
TEXTS = [
    "Hello world",
    "  leading and   trailing  ",
    "tabs\tand\n\nlines\r\n",
    "ﬁne ² ½ ｆｕｌｌ　ｗｉｄｔｈ e\u0301 n\u0303",
    "東京は日本の首都です。한국어 🙂",
    "▁under ▁▁",
    "a <sep> b<sep>c",
    "<s> </s> <unk> <pad> <extra_id_0> <mask> <extra_id_7>x",
    "zero\u200bwidth \u00a0nbsp \u0001\u0002",
    "",
    "   ",
    *random_texts(60, seed=1),
]


def saved(directory: Path, target: Path, **config: Any) -> Path:
    """The tokenizer of `directory` as transformers saves it, with changes to tokenizer_config.json."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(directory).save_pretrained(target)
    shutil.copy(directory / "config.json", target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def check_ids(directory: Path) -> dict[str, Any]:
    """Compare ids, pairs and decoded texts with transformers; returns the keys."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    keys = read_vocabulary(directory, SIZE, original=True)
    expected, found = AutoTokenizer.from_pretrained(directory), Tokenizer.from_str(str(keys[HUGGINGFACE_KEY]))
    for text in TEXTS:
        ids = expected(text)["input_ids"]
        assert found.encode(text).ids == ids, text
        assert found.encode(text, "and more").ids == expected(text, "and more")["input_ids"]
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids)
    return keys


@pytest.mark.parametrize("model_type", ["t5", "mt5", "xlm-roberta", "camembert"])
def test_a_sentencepiece_file_reads_as_transformers_loads_it(tmp_path: Path, model_type: str) -> None:
    keys = check_ids(write_unigram(tmp_path, model_type))
    assert keys["tokenizer.ggml.model"] == "t5"
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert keys["tokenizer.ggml.unknown_token_id"] == (2 if model_type.endswith("t5") else 3)
    assert len(keys["tokenizer.ggml.precompiled_charsmap"]) > 1000


@pytest.mark.parametrize("model_type", ["t5", "umt5", "xlm-roberta", "camembert", "bert"])
def test_tokenizer_json_reads_as_transformers_loads_it(tmp_path: Path, model_type: str) -> None:
    origin = "xlm-roberta" if model_type == "bert" else "t5" if model_type == "umt5" else model_type
    directory = saved(write_unigram(tmp_path / "source", origin), tmp_path / "saved")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": SIZE}))
    check_ids(directory)


@pytest.mark.parametrize(
    "config",
    [
        {"extra_ids": 0, "extra_special_tokens": None},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"additional_special_tokens": ["<new>"], "extra_special_tokens": ["<new>"]},
    ],
)
def test_settings_beside_the_vocabulary_count(tmp_path: Path, config: dict[str, Any]) -> None:
    check_ids(saved(write_unigram(tmp_path / "source"), tmp_path / "saved", **config))


def test_no_prefix_space_where_xlm_roberta_is_told_so(tmp_path: Path) -> None:
    source = write_unigram(tmp_path / "source", "xlm-roberta")
    keys = check_ids(saved(source, tmp_path / "saved", add_prefix_space=False))
    assert keys["tokenizer.ggml.add_space_prefix"] is False


def test_ids_carry_their_types(tmp_path: Path) -> None:
    keys = read_vocabulary(write_unigram(tmp_path), SIZE, original=True)
    texts, types = list(keys["tokenizer.ggml.tokens"]), np.asarray(keys["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
    assert types[:3].tolist() == [TokenType.CONTROL, TokenType.CONTROL, TokenType.UNKNOWN]
    assert types[texts.index("<extra_id_0>")] == TokenType.CONTROL
    assert types[texts.index("<sep>")] == TokenType.USER_DEFINED
    assert types[-1] == TokenType.UNUSED
    # T5's sentinels are numbered backwards, after the pieces.
    assert texts.index("<extra_id_0>") == texts.index("<extra_id_99>") + 99


@pytest.mark.parametrize("model_type", ["t5", "xlm-roberta", "camembert"])
def test_what_a_text_spells_is_text(tmp_path: Path, model_type: str) -> None:
    directory = write_unigram(tmp_path, model_type)
    keys = read_vocabulary(directory, SIZE, original=True)
    engine, training = JsonTokenizer(str(keys[HUGGINGFACE_KEY])), load_tokenizer(directory)
    control = set(training.control_ids.values())
    unknown = int(keys["tokenizer.ggml.unknown_token_id"])  # type: ignore[arg-type]
    for text in ("</s>", "a</s> b <pad>", "<extra_id_0> <mask> <s>", "<unk>"):
        ids = engine.encode(text, add_special=False)
        assert ids == training.encode(text, add_special=False)
        assert not (control - {unknown}) & set(ids), text
        assert not (control - {unknown}) & set(engine.encode(text)[1:-1]), text
    # The tokenizer itself would make control tokens of them.
    assert set(training.backend.encode("a</s> b <pad>", add_special_tokens=False).ids) & (control - {unknown})
    assert engine.encode("Hello world") == training.backend.encode("Hello world").ids


def test_broken_vocabularies_are_refused(tmp_path: Path) -> None:
    directory = saved(write_unigram(tmp_path / "source"), tmp_path / "saved")
    whole = json.loads((directory / "tokenizer.json").read_text())
    model = whole["model"]
    table = base64.b64decode(whole["normalizer"]["precompiled_charsmap"])
    cut = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table[:500]).decode()}
    broken: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": {**model, "vocab": [["a", "b"]]}}, CorruptCheckpoint, "pieces"),
        ({"model": {**model, "vocab": [["a", float("nan")]]}}, CorruptCheckpoint, "no number"),
        ({"model": {**model, "vocab": {"a": 1}}}, UnsupportedModel, "no unigram vocabulary"),
        ({"normalizer": cut}, CorruptCheckpoint, "cut short"),
    ]
    for change, error, words in broken:
        (directory / "tokenizer.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(error, match=words):
            read_vocabulary(directory, SIZE, original=True)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"neither tokenizer\.json nor spiece\.model"):
        read_vocabulary(directory, SIZE, original=True)
    with pytest.raises(UnsupportedModel, match="vocab_size"):
        read_vocabulary(write_unigram(tmp_path / "small", vocab_size=100), 100, original=True)


def test_the_real_t5_tokenizer(tmp_path: Path, shared_data: Path) -> None:
    for names in (("tokenizer.json", "tokenizer_config.json"), ("spiece.model",)):
        directory = tmp_path / names[0]
        directory.mkdir()
        for name in names:
            shutil.copy(shared_data / "tokenizers" / "t5" / name, directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 32128}))
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        expected = AutoTokenizer.from_pretrained(directory)
        found = Tokenizer.from_str(str(read_vocabulary(directory, 32128, original=True)[HUGGINGFACE_KEY]))
        for text in TEXTS:
            assert found.encode(text).ids == expected(text)["input_ids"], text
