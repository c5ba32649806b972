"""The tokenizer that an encoder's GGUF file carries gives the ids of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.vocab import read_vocabulary
from converters.vocab.huggingface import HUGGINGFACE_KEY
from tests.encoders import write_tokenizer

TEXTS = (
    *(
        "Hello the Quick fox!",
        "café CAFÉ naïve ÉCOLE İstanbul Σ",
        "中漢字abc 한",
        "a\tb\n\nc  d\u00a0e\u3000f",
        "",
        " ",
    ),
    *("[CLS] [MASK] <s> <mask> x</s>", "a" * 150 + " fox", "don't U.S.A. $5 #b", "🙂\u200d\u200b zero\x00\x07\ufffd"),
    *("e\u0301\u0323 ﬁ Ⅷ ² ½", "  leading and trailing  ", "## ##ing [unused0] unused", "playing played"),
)
BERT: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "cased": {"do_lower_case": False},
    "accents kept": {"do_lower_case": True, "strip_accents": False},
    "accents stripped": {"do_lower_case": False, "strip_accents": True},
    "Chinese words whole": {"tokenize_chinese_chars": False, "tokenizer_class": "DistilBertTokenizer"},
    "another unknown": {"unk_token": "[unused0]"},
    "ELECTRA's name": {"tokenizer_class": "ElectraTokenizer", "do_lower_case": False},
}


def check(model_dir: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(model_dir)
    ours = Tokenizer.from_str(str(read_vocabulary(model_dir, len(theirs), original=True)[HUGGINGFACE_KEY]))
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text
        if text:
            pair, wanted = ours.encode("the fox", text), theirs("the fox", text)
            assert pair.ids == wanted["input_ids"], text
            assert pair.type_ids == wanted.get("token_type_ids", pair.type_ids)


@pytest.mark.parametrize("saved", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("case", BERT)
def test_wordpiece(case: str, saved: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, "wordpiece", "Bert")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(BERT[case]))
    if saved == "tokenizer.json":
        AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink(missing_ok=True)
        # The class goes by its settings, whatever the file says of lower case.
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(BERT[case]))
    check(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": True}])
@pytest.mark.parametrize(
    ("kind", "model_type"), [("bytes", "roberta"), ("bytes", "modernbert"), ("unigram", "xlm-roberta")]
)
def test_other_vocabularies(kind: str, model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind, "ModernBert" if model_type == "modernbert" else "")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    check(tmp_path)


@pytest.mark.parametrize(("name", "model_type"), [("bert-uncased", "bert"), ("roberta", "roberta")])
def test_genuine_vocabularies(name: str, model_type: str, shared_data: Path, tmp_path: Path) -> None:
    import shutil

    model_dir = shutil.copytree(shared_data / "tokenizers" / name, tmp_path / "model")
    (model_dir / "config.json").write_text(json.dumps({"model_type": model_type}))
    check(model_dir)


def test_a_decoder_with_such_a_vocabulary_is_refused(tmp_path: Path) -> None:
    from converters import UnsupportedModel

    write_tokenizer(tmp_path, "wordpiece", "Bert")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        read_vocabulary(tmp_path, 500)


def test_texts_that_become_alike_stay_apart(tmp_path: Path) -> None:
    # llama.cpp marks a word's beginning: "##▁a" and "a" would be one text, and it stops at two that are alike.
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##▁a", "##a"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    texts = read_vocabulary(tmp_path, 8, original=True)["tokenizer.ggml.tokens"]
    assert isinstance(texts, list)
    assert len(set(map(str, texts))) == 8
