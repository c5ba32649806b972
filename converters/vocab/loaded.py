"""The tokenizer as transformers 5 loads it, which is what a model is trained with: tokenizer.json, or what replaces it.

`AutoTokenizer` takes some classes by their word: it keeps the vocabulary and the merges and sets up the class's own
normalizer and pre-tokenizer, whatever tokenizer.json says. Which class that is depends on the model's type as well. The
outcome is described in tokenizer.json's own terms. Source: transformers' tokenization_auto.py and the classes' modules.
"""

from __future__ import annotations

import json
from typing import Any

from converters.errors import CorruptCheckpoint, UnsupportedModel
from converters.vocab.files import TokenizerFiles, token_text
from converters.vocab.proto import SentencePieceModel, read_sentencepiece
from converters.vocab.unigram import UNIGRAM_CLASSES, load_unigram
from converters.vocab.wordpiece import bert_tokenizer, read_vocab_txt

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CLASS_OF_TYPE = {
    "bert": "BertTokenizer",
    "camembert": "CamembertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "mistral": "TokenizersBackend",
    "mixtral": "TokenizersBackend",
    "modernbert": "TokenizersBackend",
    "mt5": "T5Tokenizer",
    "phi3": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "umt5": "TokenizersBackend",
    "xlm-roberta": "XLMRobertaTokenizer",
}
"""The class transformers has registered for a model type; "TokenizersBackend" takes tokenizer.json as it is."""
_TYPES_OVERRULING_THEIR_FILES = {"modernbert", "phi3", "qwen2"}
"""Model types whose registered class wins over the one that tokenizer_config.json names."""
_AS_IS = "TokenizersBackend"
_WORDPIECE = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_REBUILDING = (
    *("LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer"),
    *_WORDPIECE,
    *sorted(UNIGRAM_CLASSES),
)
_BERT_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA_TOKENS = {
    **dict.fromkeys(("bos", "cls"), "<s>"),
    **dict.fromkeys(("eos", "sep"), "</s>"),
    **{kind: f"<{kind}>" for kind in ("unk", "pad", "mask")},
}
_NAMED_BY_CLASS = {"RobertaTokenizer": _ROBERTA_TOKENS, **dict.fromkeys(_WORDPIECE, _BERT_TOKENS)}
"""The special tokens that a class has where no file names others."""


def load_tokenizer(files: TokenizerFiles) -> dict[str, Any]:
    """tokenizer.json's content as transformers would have it in memory; `CorruptCheckpoint` without any tokenizer."""
    tokenizer = dict(files.tokenizer)
    kind = tokenizer_class(files)
    if kind in UNIGRAM_CLASSES:
        return load_unigram(files, kind)
    if kind in _NAMED_BY_CLASS:
        named = {f"{key}_token": text for key, text in _NAMED_BY_CLASS[kind].items()}
        files.config = {**named, **files.config, **files.legacy_special_tokens}
    if not tokenizer:
        tokenizer = _from_other_files(files, kind)
    model = tokenizer.get("model")
    if not isinstance(model, dict):
        raise CorruptCheckpoint(f"{files.model_dir / 'tokenizer.json'} describes no model.", hint="Download it again.")
    files.tokenizer = tokenizer  # where the added tokens' ids are looked up
    if kind in _REBUILDING:
        tokenizer.update(_rebuilt(files, kind, model))
    return tokenizer


def tokenizer_class(files: TokenizerFiles) -> str:
    """The class `AutoTokenizer` picks: one of those that rebuild, or "TokenizersBackend" for any other."""
    config = files.read_json("config.json")
    model_type = (config.get("text_config") or {}).get("model_type") if "text_config" in config else None
    registered = _CLASS_OF_TYPE.get(str(config.get("model_type") or model_type))
    named = files.config.get("tokenizer_class") or config.get("tokenizer_class")
    if not isinstance(named, str) or not named:
        return _known(registered or _AS_IS)
    named = named.removesuffix("Fast")
    if named == "LlamaTokenizer" and registered is None and is_byte_level(files.tokenizer):
        return _AS_IS
    if registered is not None and registered != named:
        if registered == _AS_IS:
            return _AS_IS
        return _known(registered if config.get("model_type") in _TYPES_OVERRULING_THEIR_FILES else named)
    return _known(named)


def prefix_scheme(files: TokenizerFiles) -> str:
    """When LlamaTokenizer puts a space in front: "always", "first" or "never"."""
    added = files.config.get("add_prefix_space")
    if added is False:
        return "never"
    return "always" if files.config.get("legacy") else "first"


def _known(name: str) -> str:
    return name if name in _REBUILDING else _AS_IS


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json maps bytes to letters before it merges (GPT-2's kind of BPE)."""
    return '"ByteLevel"' in json.dumps(tokenizer.get("pre_tokenizer"))


def _rebuilt(files: TokenizerFiles, kind: str, model: dict[str, Any]) -> dict[str, Any]:
    if kind in _WORDPIECE:
        return bert_tokenizer(files, model)
    if kind == "LlamaTokenizer":
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prefix_scheme(files), "split": False}
        flags = {"byte_fallback": True, "fuse_unk": True, "unk_token": None, "ignore_merges": False}
        return {"normalizer": None, "pre_tokenizer": metaspace, "model": {**model, **flags}}
    if kind == "GemmaTokenizer":
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        flags = {"byte_fallback": True, "fuse_unk": True, "ignore_merges": False}
        return {"normalizer": spaces, "pre_tokenizer": None, "model": {**model, **flags}}
    prefix = bool(files.config.get("add_prefix_space"))
    flags = {"byte_fallback": False, "unk_token": None, "ignore_merges": False}
    regex = kind in ("GPT2Tokenizer", "RobertaTokenizer")
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}
    if kind == "GPT2Tokenizer":
        return {"normalizer": None, "pre_tokenizer": byte_level, "model": {**model, **flags}}
    if kind == "RobertaTokenizer":
        around = _around_roberta(files, model, prefix)
        return {
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "model": {**model, **flags, "fuse_unk": False},
            "post_processor": around,
            "decoder": {**byte_level, "add_prefix_space": True},
        }
    split = {"type": "Split", "pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": sequence, "model": {**model, **flags}}


def _around_roberta(files: TokenizerFiles, model: dict[str, Any], prefix: bool) -> dict[str, Any]:
    named = {key: token_text(files.config.get(f"{key}_token")) for key in ("sep", "cls")}
    ids = files.token_ids(model.get("vocab"))
    unknown = next((text for text in named.values() if text not in ids), None)
    if unknown is not None:
        raise CorruptCheckpoint(f"The tokenizer adds {unknown!r} to every text, which is not in its vocabulary.")
    pairs = {key: [text, ids[str(text)]] for key, text in named.items()}
    trim = bool(files.config.get("trim_offsets", True))
    return {"type": "RobertaProcessing", **pairs, "trim_offsets": trim, "add_prefix_space": prefix}


def _from_other_files(files: TokenizerFiles, kind: str) -> dict[str, Any]:
    if kind in _WORDPIECE and files.has("vocab.txt"):
        return {"model": {"type": "WordPiece", "vocab": read_vocab_txt(files.model_dir / "vocab.txt")}}
    if files.has("tokenizer.model"):
        return _from_sentencepiece(read_sentencepiece(files.model_dir / "tokenizer.model"), kind)
    if files.has("vocab.json") and files.has("merges.txt"):
        if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer"):
            raise UnsupportedModel(
                f"{files.model_dir} has vocab.json and merges.txt, but no tokenizer.json that says how text is split.",
                hint="Load the tokenizer with transformers and save it again: that writes tokenizer.json.",
            )
        lines = (files.model_dir / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return {"model": {"type": "BPE", "vocab": files.read_json("vocab.json"), "merges": merges}}
    found = "tekken.json, which is not read here" if files.has("tekken.json") else "no tokenizer files"
    raise CorruptCheckpoint(
        f"{files.model_dir} has {found}.", hint="Put the model's tokenizer.json beside its weights."
    )


def _from_sentencepiece(model: SentencePieceModel, kind: str) -> dict[str, Any]:
    if model.is_unigram and kind == _AS_IS:
        raise UnsupportedModel(
            f"{model.path} is a unigram vocabulary, for which llama.cpp has no exact equivalent in decoders.",
            hint="Only SentencePiece vocabularies of type BPE are converted.",
        )
    if kind == _AS_IS and model.has_charsmap:
        raise UnsupportedModel(
            f"{model.path} normalizes text by a table of characters, which llama.cpp does not do here."
        )
    vocabulary = {piece.text: number for number, piece in enumerate(model.pieces)}
    added = [
        {"id": number, "content": piece.text, "special": piece.is_control, "is_piece": True}
        for number, piece in enumerate(model.pieces)
        if piece.is_control or piece.is_user_defined
    ]
    return {
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": generate_merges(vocabulary),
            "byte_fallback": model.byte_fallback,
            "unk_token": model.unknown,
        },
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    }


def generate_merges(vocabulary: dict[str, int]) -> list[list[str]]:
    """The merges that a vocabulary without any stands for: every split of a piece in two, in the pieces' order."""
    merges = []
    for piece in sorted(vocabulary, key=vocabulary.__getitem__):
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        merges += [[left, right] for left, right in splits if left in vocabulary and right in vocabulary]
    return merges
