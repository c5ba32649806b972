"""SentencePiece unigram vocabularies (T5, XLM-RoBERTa, CamemBERT) → pieces, scores, types and the table of characters.

T5Tokenizer, XLMRobertaTokenizer and CamembertTokenizer keep the pieces and the table, whatever file they come from, and
set up the rest themselves; every other class takes tokenizer.json as it is. What llama.cpp's own tokenizer makes of
these keys differs in a few texts, so the GGUF carries the tokenizer itself as well (see `huggingface`).
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.vocab.files import TokenizerFiles, normalizer_steps, token_text
from converters.vocab.proto import SentencePieceModel, read_sentencepiece
from converters.vocab.tokens import TokenTable, TokenType
from converters.writer import Value

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter has them
_EXTRA_IDS = 100

Pieces = list[tuple[str, float]]


@dataclass(frozen=True)
class _Class:
    """What a tokenizer class of transformers brings along."""

    file: str
    """The SentencePiece model it reads when there is no tokenizer.json."""
    unknown_id: int
    names: Mapping[str, str] = field(default_factory=dict)
    """Its special tokens, where tokenizer_config.json does not say otherwise."""


_FAIRSEQ = {
    **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
    **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
    **{f"{kind}_token": f"<{kind}>" for kind in ("unk", "pad", "mask")},
}
_CLASSES = {
    "T5Tokenizer": _Class("spiece.model", 2, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "XLMRobertaTokenizer": _Class("sentencepiece.bpe.model", 3, _FAIRSEQ),
    "CamembertTokenizer": _Class("sentencepiece.bpe.model", 3, _FAIRSEQ),
}
UNIGRAM_CLASSES = frozenset(_CLASSES)
"""The classes that build a unigram tokenizer of their own kind."""


def is_unigram(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json holds a unigram model."""
    model = tokenizer.get("model")
    return isinstance(model, Mapping) and isinstance(model.get("vocab"), list)


def load_unigram(files: TokenizerFiles, kind: str) -> dict[str, Any]:
    """tokenizer.json's content as the class `kind` (one of `UNIGRAM_CLASSES`) has it in memory."""
    known = _CLASSES[kind]
    files.config = {**known.names, **files.config, **files.legacy_special_tokens}
    if files.tokenizer:
        pieces, charsmap = _pieces(files), _charsmap(files.tokenizer)
        added = list(files.tokenizer.get("added_tokens") or [])
    else:
        source = _sentencepiece(files, known)
        pieces, charsmap = _rearranged(source, kind, files.config), base64.b64encode(source.charsmap).decode()
        added = _added_pieces(source, pieces)
    added = _with_named(files, kind, pieces, added)
    unknown = known.unknown_id
    if kind == "CamembertTokenizer":
        texts = [text for text, _ in pieces]
        name = token_text(files.config["unk_token"])
        unknown = texts.index(name) if name in texts else 0
    return {
        "added_tokens": added,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, _metaspace(files, kind)]},
        "post_processor": _around(kind, files.config, pieces, added),
        "decoder": _metaspace(files, kind),
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": False},
    }


def read_unigram(files: TokenizerFiles, vocab_size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys of a unigram vocabulary, padded to `vocab_size` tokens. Raises `UnsupportedModel`."""
    tokenizer = files.tokenizer
    model = tokenizer["model"]
    pieces = _pieces(files)
    unknown = model.get("unk_id")
    if not isinstance(unknown, int) or not 0 <= unknown < len(pieces):
        raise UnsupportedModel("The tokenizer has no token for unknown characters (unk_id), which llama.cpp needs.")
    table = TokenTable(vocab_size)
    table.add_vocabulary({text: number for number, (text, _) in enumerate(pieces)})
    for number, (text, _) in enumerate(pieces):
        if model.get("byte_fallback") and _BYTE.fullmatch(text):
            table.types[number] = TokenType.BYTE
    scores = np.full(vocab_size, _PADDING_SCORE, dtype=np.float32)
    scores[: len(pieces)] = [score for _, score in pieces]
    for token in files.added_tokens.values():
        table.add_token(token)
        if len(pieces) <= token.id < vocab_size:
            scores[token.id] = _ADDED_SCORE
    table.types[unknown] = TokenType.UNKNOWN
    prepends, merges = _spaces(tokenizer)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": table.texts(),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.asarray(table.types, dtype=np.int32),
        "tokenizer.ggml.unknown_token_id": unknown,
        # llama.cpp adds an EOS to texts of this kind unless told not to; `read_special` says where one is added.
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": prepends,
        "tokenizer.ggml.remove_extra_whitespaces": merges,
        "edgetune.tokenizer.prefix_space": "always" if prepends else "never",
    }
    if charsmap := _charsmap(tokenizer):
        keys["tokenizer.ggml.precompiled_charsmap"] = _table_of_characters(files, charsmap)
    return keys


def _pieces(files: TokenizerFiles) -> Pieces:
    if not is_unigram(files.tokenizer):
        raise UnsupportedModel(
            "tokenizer.json holds no unigram vocabulary, which the class of this tokenizer needs.",
            hint='Set "tokenizer_class" in tokenizer_config.json to "PreTrainedTokenizerFast" if it was trained so.',
        )
    try:
        pieces = [(str(text), float(score)) for text, score in files.tokenizer["model"]["vocab"]]
    except (TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            f"{files.model_dir / 'tokenizer.json'} holds a broken list of pieces: {error}.", hint="Download it again."
        ) from error
    if not all(np.isfinite(score) for _, score in pieces):
        raise CorruptCheckpoint(f"{files.model_dir / 'tokenizer.json'} holds a piece whose score is no number.")
    return pieces


def _sentencepiece(files: TokenizerFiles, known: _Class) -> SentencePieceModel:
    if not files.has(known.file):
        raise CorruptCheckpoint(
            f"{files.model_dir} has neither tokenizer.json nor {known.file}.",
            hint="Put the model's tokenizer.json beside its weights.",
        )
    source = read_sentencepiece(files.model_dir / known.file)
    if not source.is_unigram:
        raise UnsupportedModel(f"{source.path} is no unigram vocabulary, which the class of this tokenizer needs.")
    return source


def _rearranged(source: SentencePieceModel, kind: str, config: Mapping[str, Any]) -> Pieces:
    """The pieces under the ids that the model knows them by."""
    pieces = [(piece.text, piece.score) for piece in source.pieces]
    if kind == "T5Tokenizer":
        return pieces + [(f"<extra_id_{number}>", 0.0) for number in reversed(range(_extra_ids(config)))]
    if kind == "CamembertTokenizer":
        first = [("<s>NOTUSED", 0.0), ("<pad>", 0.0), ("</s>NOTUSED", 0.0), ("<unk>", 0.0), ("<unk>NOTUSED", -100.0)]
        return [*first, *pieces[1:], ("<mask>", 0.0)]
    # fairseq's four special tokens stand where SentencePiece has three.
    named = [token_text(config[f"{name}_token"]) or "" for name in ("bos", "pad", "eos", "unk", "mask")]
    return [*((text, 0.0) for text in named[:4]), *pieces[3:], (named[4], 0.0)]


def _added_pieces(source: SentencePieceModel, pieces: Pieces) -> list[dict[str, Any]]:
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    return [
        {"id": ids[piece.text], "content": piece.text, "special": piece.is_control}
        for piece in source.pieces
        if (piece.is_control or piece.is_user_defined) and piece.text in ids
    ]


def _extra_ids(config: Mapping[str, Any]) -> int:
    count = config.get("extra_ids", _EXTRA_IDS)
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else _EXTRA_IDS


def _with_named(
    files: TokenizerFiles, kind: str, pieces: Pieces, added: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """`added` with the tokens that the class names and no list has; new ones are numbered after all others."""
    config = files.config
    names = [token_text(config.get(name)) for name in _CLASSES[kind].names]
    lists = [config[key] for key in ("extra_special_tokens", "additional_special_tokens") if key in config]
    names += [token_text(entry) for entry in (lists[0] or [] if lists else [])]
    if kind == "T5Tokenizer" and not lists:
        names += [f"<extra_id_{number}>" for number in range(_extra_ids(config))]
    elsewhere = {token_text(entry): int(number) for number, entry in (config.get("added_tokens_decoder") or {}).items()}
    ids = {text: number for number, (text, _) in enumerate(pieces)}
    known = {entry.get("content") for entry in added} | elsewhere.keys()
    taken = [len(pieces) - 1, *(int(entry["id"]) for entry in added if "id" in entry), *elsewhere.values()]
    following = max(taken) + 1
    more = []
    for text in dict.fromkeys(name for name in names if name and name not in known):
        more.append({"id": ids.get(text, following), "content": text, "special": True})
        following += text not in ids
    return [*added, *more]


def _metaspace(files: TokenizerFiles, kind: str) -> dict[str, Any]:
    prefix = kind == "T5Tokenizer" or files.config.get("add_prefix_space") is not False
    scheme = "always" if prefix else "never"
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def _around(kind: str, config: Mapping[str, Any], pieces: Pieces, added: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is put around a text and a pair of texts."""
    ids = {text: number for number, (text, _) in enumerate(pieces)} | {one["content"]: one["id"] for one in added}
    eos = token_text(config["eos_token"]) or "</s>"
    bos = [] if kind == "T5Tokenizer" else [token_text(config["bos_token"]) or "<s>"]
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    begin, end = [_special(text) for text in bos], [_special(eos)]
    # RoBERTa's kin keep two ends between the texts of a pair.
    between = end * (len(bos) + 1)
    return {
        "type": "TemplateProcessing",
        "single": [*begin, first, *end],
        "pair": [*begin, first, *between, second, *end],
        "special_tokens": {text: {"id": text, "ids": [ids.get(text, 0)], "tokens": [text]} for text in (*bos, eos)},
    }


def _special(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _charsmap(tokenizer: Mapping[str, Any]) -> str:
    """The table of characters that texts are normalized by, in base64; empty when there is none."""
    steps = normalizer_steps(tokenizer)
    return next((str(step.get("precompiled_charsmap") or "") for step in steps if step["type"] == "Precompiled"), "")


def _table_of_characters(files: TokenizerFiles, charsmap: str) -> NDArray[np.uint8]:
    try:
        raw = base64.b64decode(charsmap, validate=True)
        (size,) = struct.unpack_from("<I", raw)
    except (binascii.Error, struct.error) as error:
        raise CorruptCheckpoint(f"{files.model_dir} has a broken table of characters: {error}.") from error
    if size + 4 >= len(raw):
        raise CorruptCheckpoint(
            f"The table of characters in {files.model_dir} is cut short.", hint="Download it again."
        )
    return np.frombuffer(raw, dtype=np.uint8)


def _spaces(tokenizer: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a space is put in front of a text, and whether runs of spaces count as one."""
    stage = tokenizer.get("pre_tokenizer") or {}
    steps = stage.get("pretokenizers") or [stage]
    meta: Mapping[str, Any] = next((step for step in steps if step.get("type") == "Metaspace"), {})
    scheme = meta.get("prepend_scheme") or ("always" if meta.get("add_prefix_space", True) else "never")
    merges = any(step.get("type") == "WhitespaceSplit" for step in steps)
    merges = merges or any("{2,}" in str(step.get("pattern")) for step in normalizer_steps(tokenizer))
    return bool(meta) and scheme != "never", merges
