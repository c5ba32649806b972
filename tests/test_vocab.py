"""Token ids from the GGUF vocabulary equal Hugging Face's, for vocabularies trained here and for real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import CorruptCheckpoint, UnsupportedModel
from converters.encoding import TensorType
from converters.vocab import read_vocabulary
from converters.vocab.pre_tokenizer import KNOWN, recognise
from converters.vocab.proto import read_sentencepiece
from converters.writer import GgufWriter

TEXTS = [
    "Hello world",
    " leading",
    "  two leading",
    "trailing  ",
    "a\n\nb\r\nc\td",
    "   \n  x\n\n\n",
    "naïve café Straße",
    "東京は日本の首都です。한국어",
    "🙂🙂 👨‍👩‍👧 emoji",
    "0 12 123 1234 12345 3.14159 1,000,000",
    "don't I'LL we'Re 'tis",
    "def f(x):\n    return x**2  # comment\n\tpass",
    "<s> </s> <unk> <|im_start|>user<|im_end|> <0x0A>",
    "...!!!???---===",
    "\u00a0nbsp\u3000wide",
    "e\u0301 combining",
    "привет ПРИВЕТ ΑΒΓ",
    "http://example.com/path?q=1&r=2#frag",
    "",
    " ",
    "\n",
    "▁under ▁▁",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, don't it? 0123456789 12345",
    "hello world  hello   there\n\n    return x + y\n\tpass\n",
    "naïve café 東京 привет 🙂 (a && b || !c) ... --- http://example.com/path",
] * 30


def byte_level(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A byte-level BPE trained with the pre-tokenizer, as tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    blank = Tokenizer(models.BPE())
    blank.pre_tokenizer = Tokenizer.from_str(
        json.dumps(
            {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer}
        )
    ).pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|endoftext|>", "<|im_start|>"]
    )
    blank.train_from_iterator(CORPUS, trainer)
    tokenizer: dict[str, Any] = json.loads(blank.to_str())
    tokenizer["model"] |= model
    return tokenizer


def characters(**stages: Any) -> dict[str, Any]:
    """A BPE over characters with byte fallback, trained as nobody's SentencePiece is: one merge for a token."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    blank = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blank.normalizer = normalizers.Replace(" ", "▁")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=special)
    words = [word for line in CORPUS for word in line.replace("\n", " ").split(" ")]
    blank.train_from_iterator([f" {word}" for word in words], trainer)
    tokenizer: dict[str, Any] = json.loads(blank.to_str())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    return {**tokenizer, **stages}


def completed(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The same vocabulary with every way to put a token together listed, as transformers does for SentencePiece."""
    from converters.vocab.loaded import generate_merges

    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary = {text: number for text, number in tokenizer["model"]["vocab"].items() if text not in special}
    model = {**tokenizer["model"], "merges": generate_merges(vocabulary)}
    return {**tokenizer, "model": model}


def write_tokenizer(directory: Path, tokenizer: dict[str, Any], *, model_type: str = "llama", **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    if tokenizer["model"]["vocab"].get("</s>") is None:
        settings["eos_token"] = "<|endoftext|>"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    size = max(tokenizer["model"]["vocab"].values()) + 9
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": size}))
    return directory


def vocabulary_file(model_dir: Path, path: Path) -> Path:
    """A GGUF file that holds the vocabulary of `model_dir`, and nothing to speak of besides."""
    size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    keys = {"general.architecture": "llama", "general.type": "model", "general.name": "v"}
    with GgufWriter(path) as writer:
        writer.begin({**keys, **read_vocabulary(model_dir, size)}, {"token_embd.weight": (1, 32)})
        writer.write(np.zeros((1, 32), np.float32), writer.add("token_embd.weight", TensorType.F32))
        writer.finish()
    return path


def differing(model_dir: Path, tmp_path: Path) -> list[str]:
    """The texts that our engine reads as other ids than transformers does."""
    from transformers import AutoTokenizer

    from edgetune.engine.tokenizer import GgufTokenizer

    theirs = AutoTokenizer.from_pretrained(model_dir)
    theirs.split_special_tokens = True
    ours = GgufTokenizer.open(vocabulary_file(model_dir, tmp_path / "vocabulary.gguf"))
    try:
        return [
            text
            for text in TEXTS
            for special in (False, True)
            if theirs.encode(text, add_special_tokens=special) != ours.encode(text, add_special=special)
        ]
    finally:
        ours.close()


EXACT = ["gpt-2", "llama-bpe", "dbrx", "qwen2", "smollm", "deepseek-v3", "ufakzeka", "seed-coder", "gpt-4o", "tekken"]


@pytest.mark.parametrize("name", EXACT)
def test_a_retrained_vocabulary_with_a_known_pre_tokenizer(name: str, tmp_path: Path) -> None:
    known = next(one for one in KNOWN if one.name == name)
    tokenizer = byte_level({"type": "Sequence", "pretokenizers": list(known.steps)}, ignore_merges=known.ignore_merges)
    assert recognise(tokenizer) == name
    model_dir = write_tokenizer(tmp_path / "model", tokenizer)
    assert differing(model_dir, tmp_path) == []


_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPELLINGS = {
    "possessive": (
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        ),
        "dbrx",
    ),
    "line ends as they are": (
        (
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}"
            "| ?[^\\s\\p{L}\\p{N}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        "qwen2",
    ),
    "longhand": (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}" + _REST,
        "qwen2",
    ),
    "gpt-2 by its regex": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", "gpt-2"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_rule(spelling: str) -> None:
    regex, name = SPELLINGS[spelling]
    steps = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    assert recognise({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": {}}) == name


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Split", "pattern": {"Regex": r"\p{N}{1,4}|\S+|\s+"}, "behavior": "Isolated", "invert": False}],
        [{"type": "Whitespace"}],
        [],
    ],
)
def test_an_unknown_rule_is_refused_with_the_reason(steps: list[dict[str, Any]]) -> None:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    tokenizer = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}, "model": {}}
    with pytest.raises(UnsupportedModel, match="no pre-tokenizer"):
        recognise(tokenizer)


def metaspace(scheme: str) -> dict[str, Any]:
    stage = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": stage}


def prepended() -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    return {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


CHARACTER_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "first": lambda: characters(**metaspace("first")),
    "never": lambda: characters(**metaspace("never")),
    "always": lambda: characters(**metaspace("always")),
    "complete-first": lambda: completed(characters(**metaspace("first"))),
    "complete-never": lambda: completed(characters(**metaspace("never"))),
    "complete-always": lambda: completed(characters(**metaspace("always"))),
    "complete-prepended": lambda: completed(characters(**prepended())),
}


@pytest.mark.parametrize("case", CHARACTER_CASES)
def test_a_vocabulary_over_characters(case: str, tmp_path: Path) -> None:
    model_dir = write_tokenizer(tmp_path / "model", CHARACTER_CASES[case](), bos_token="<s>", unk_token="<unk>")
    size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    kind = read_vocabulary(model_dir, size)["tokenizer.ggml.model"]
    assert kind == ("llama" if case.startswith("complete") else "gpt2")
    assert differing(model_dir, tmp_path) == []


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_tokenizer_is_taken_by_its_word(legacy: bool, tmp_path: Path) -> None:
    tokenizer = completed(characters(**prepended()))
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    model_dir = write_tokenizer(tmp_path / "model", tokenizer, **settings)
    assert differing(model_dir, tmp_path) == []


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    known = next(one for one in KNOWN if one.name == "gpt-2")
    tokenizer = byte_level({"type": "Sequence", "pretokenizers": list(known.steps)})
    model_dir = write_tokenizer(tmp_path / "model", tokenizer, model_type="gpt2", tokenizer_class="GPT2Tokenizer")
    (model_dir / "tokenizer.json").unlink()
    (model_dir / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    (model_dir / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    assert differing(model_dir, tmp_path) == []


def qwen_like(tmp_path: Path, **config: Any) -> Path:
    known = next(one for one in KNOWN if one.name == "qwen2")
    tokenizer = byte_level({"type": "Sequence", "pretokenizers": list(known.steps)})
    return write_tokenizer(tmp_path / "model", tokenizer, **config)


def keys_of(model_dir: Path) -> dict[str, Any]:
    return dict(read_vocabulary(model_dir, json.loads((model_dir / "config.json").read_text())["vocab_size"]))


def test_padding_types_and_special_ids(tmp_path: Path) -> None:
    keys = keys_of(qwen_like(tmp_path, bos_token={"content": "<|im_start|>"}))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert types[-1] == 5
    assert types[0] == 3
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.bos_token_id"]) == (0, 1)


def test_every_token_that_stops_generation_is_written(tmp_path: Path) -> None:
    model_dir = qwen_like(tmp_path)
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 20, 21]}))
    path = vocabulary_file(model_dir, tmp_path / "vocabulary.gguf")
    from edgetune.engine.tokenizer import GgufTokenizer

    keys = keys_of(model_dir)
    assert {keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.eom_token_id"]} == {20, 21}
    tokenizer = GgufTokenizer.open(path)
    assert tokenizer.eos_id == 0
    tokenizer.close()


@pytest.mark.parametrize("place", ["jinja", "json", "config", "list"])
def test_the_chat_template_is_found_wherever_it_is(place: str, tmp_path: Path) -> None:
    model_dir = qwen_like(tmp_path)
    if place == "jinja":
        (model_dir / "chat_template.jinja").write_text("template")
    elif place == "json":
        (model_dir / "chat_template.json").write_text(json.dumps({"chat_template": "template"}))
    else:
        listed = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "template"}]
        config = json.loads((model_dir / "tokenizer_config.json").read_text())
        config["chat_template"] = "template" if place == "config" else listed
        (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    keys = keys_of(model_dir)
    assert keys["tokenizer.chat_template"] == "template"
    assert keys.get("tokenizer.chat_template.tool_use") == ("other" if place == "list" else None)


def test_bos_comes_from_the_post_processor(tmp_path: Path) -> None:
    model_dir = qwen_like(tmp_path, add_bos_token=False, bos_token="<|im_start|>")
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    start, text = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [text],
        "special_tokens": special,
    }
    (model_dir / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert keys_of(model_dir)["tokenizer.ggml.add_bos_token"] is True
    assert differing(model_dir, tmp_path) == []


REFUSED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Lowercase": lambda one: {**one, "normalizer": {"type": "Lowercase"}},
    "Unigram": lambda one: {**one, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}},
    "WordPiece": lambda one: {**one, "model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "end_of_word_suffix": lambda one: {**one, "model": {**one["model"], "end_of_word_suffix": "</w>"}},
    "add_prefix_space": lambda one: {
        **one,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_read_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    model_dir = qwen_like(tmp_path)
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    (model_dir / "tokenizer.json").write_text(json.dumps(REFUSED[what](tokenizer)))
    with pytest.raises(UnsupportedModel, match=what):
        keys_of(model_dir)


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="vocab_size is 300"):
        read_vocabulary(qwen_like(tmp_path), 300)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3}'])
def test_broken_tokenizer_files(content: bytes, tmp_path: Path) -> None:
    model_dir = qwen_like(tmp_path)
    (model_dir / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        keys_of(model_dir)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="no tokenizer files"):
        read_vocabulary(tmp_path, 10)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x0a\x7f\x01"])
def test_a_broken_sentencepiece_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        read_sentencepiece(tmp_path / "tokenizer.model")


REAL = {
    "qwen2.5": ("tokenizers/qwen2.5", {"model_type": "qwen2", "vocab_size": 151936}),
    "phi-3": ("tokenizers/phi-3-mini", {"model_type": "phi3", "vocab_size": 32064}),
    "phi-3 as Llama": ("tokenizers/phi-3-mini", {"model_type": "llama", "vocab_size": 32064}),
    "stories260k": ("models/stories260k", {"model_type": "llama", "vocab_size": 512}),
    "roberta": ("tokenizers/roberta", {"model_type": "llama", "vocab_size": 50265, "eos_token_id": 2}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies(name: str, shared_data: Path, tmp_path: Path) -> None:
    folder, config = REAL[name]
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for path in (shared_data / folder).glob("tokenizer*"):
        shutil.copyfile(path, model_dir / path.name)
    (model_dir / "config.json").write_text(json.dumps(config))
    # llama.cpp takes "</s>" for a control token in any vocabulary; Phi-3's is none, and is matched in text.
    expected = [text for text in TEXTS if "</s>" in text and name.startswith("phi-3")]
    assert set(differing(model_dir, tmp_path)) == set(expected)
