"""WordPiece (BERT's kind of vocabulary) → tokens, types and the flags that llama.cpp's own WordPiece knows.

llama.cpp marks the beginning of a word where Hugging Face marks its continuation ("##"). It has no limit on a word's
length, no switch for Chinese characters and tables of its own for accents and punctuation, so texts that need any of
these come out differently there: the file carries the original tokenizer as well (see `huggingface`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CorruptCheckpoint
from converters.vocab.files import TokenizerFiles, token_text
from converters.vocab.tokens import TokenTable, TokenType
from converters.writer import Value

_CONTINUATION, _WORD_BEGIN = "##", "▁"
_TRIMMED = (
    " \t\n\x0b\x0c\r\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What `tokenizers` takes off the end of a line of vocab.txt: Unicode's white space."""


def read_wordpiece(files: TokenizerFiles, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys of a WordPiece vocabulary, padded to `vocab_size` tokens."""
    model = files.tokenizer["model"]
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise CorruptCheckpoint(f"{files.model_dir / 'tokenizer.json'} holds no WordPiece vocabulary.")
    table = TokenTable(vocab_size)
    table.add_vocabulary(vocabulary)
    for token in files.added_tokens.values():
        table.add_token(token)
    prefix = str(model.get("continuing_subword_prefix") or _CONTINUATION)
    texts = [
        _marked(text, prefix) if kind == TokenType.NORMAL else text
        for text, kind in zip(table.texts(), table.types, strict=True)
    ]
    lowercase, strip_accents = _bert_flags(files.tokenizer)
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": _distinct(texts),
        "tokenizer.ggml.token_type": np.asarray(table.types, dtype=np.int32),
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.normalizer.strip_accents": strip_accents,
    }


def read_vocab_txt(path: Path) -> dict[str, int]:
    """BERT's vocab.txt: a token a line; of a token that is there twice, the last line counts."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{path} is not UTF-8 text.", hint="Download it again.") from error
    return {line.rstrip(_TRIMMED): number for number, line in enumerate(lines)}


def bert_tokenizer(files: TokenizerFiles, model: dict[str, Any]) -> dict[str, Any]:
    """What transformers' BertTokenizer sets up around the vocabulary of `model`, whatever tokenizer.json says."""
    config = files.config
    named = {key: token_text(config.get(f"{key}_token")) or "" for key in ("unk", "cls", "sep")}
    vocabulary = model.get("vocab")
    ids = files.token_ids(vocabulary)
    ends = {key: named[key] for key in ("cls", "sep")}
    unknown = next((text for text in ends.values() if text not in ids), None)
    if unknown is not None:
        raise CorruptCheckpoint(f"The tokenizer adds {unknown!r} to every text, which is not in its vocabulary.")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
            "strip_accents": config.get("strip_accents"),
            "lowercase": bool(config.get("do_lower_case", True)),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": _CONTINUATION, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": named["unk"],
            "continuing_subword_prefix": _CONTINUATION,
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(ends["cls"], 0), _sequence("A", 0), _special(ends["sep"], 0)],
            "pair": [
                *(_special(ends["cls"], 0), _sequence("A", 0), _special(ends["sep"], 0)),
                *(_sequence("B", 1), _special(ends["sep"], 1)),
            ],
            "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in ends.values()},
        },
    }


def _special(text: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": kind}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def _marked(text: str, prefix: str) -> str:
    return text.removeprefix(prefix) if text.startswith(prefix) else _WORD_BEGIN + text


def _distinct(texts: list[str]) -> list[str]:
    """`texts` with those that are there already named after their ids: llama.cpp takes each text once."""
    seen: set[str] = set()
    distinct = []
    for number, text in enumerate(texts):
        if text in seen:
            text = f"[{text}:{number}]"
        seen.add(text)
        distinct.append(text)
    return distinct


def _bert_flags(tokenizer: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer lower-cases, and whether it strips accents."""
    stage = tokenizer.get("normalizer")
    steps = (stage.get("normalizers") or [stage]) if isinstance(stage, dict) else []
    lowercase = strip = False
    for step in steps:
        if step.get("type") == "BertNormalizer":
            lowercase = lowercase or bool(step.get("lowercase"))
            strip = strip or bool(step.get("lowercase") if step.get("strip_accents") is None else step["strip_accents"])
        lowercase = lowercase or step.get("type") == "Lowercase"
        strip = strip or step.get("type") == "StripAccents"
    return lowercase, strip
