"""Recognises a byte-level pre-tokenizer by what it does, under llama.cpp's name for the same behaviour.

llama.cpp's converter looks the name up by a hash of token ids, so it knows no vocabulary it has not met. Here the rules
that tokenizer.json spells out are compared: first as written, then by splitting a few thousand texts with both. One
that no name stands for is refused: there is no place for a regular expression in a GGUF file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.errors import UnsupportedModel
from converters.vocab.loaded import QWEN2_REGEX
from converters.vocab.merges import merge_pairs

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DEEPSEEK_LETTERS = (
    r"\s?["
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
"""Spelled as escapes: some of the letters have look-alikes that editors put in their place."""
_CHINESE = r"[一-龥ࠀ-一가-퟿]+"

_Step = dict[str, Any]
"""One pre-tokenizer as tokenizer.json writes it."""


def _split(*regexes: str) -> list[_Step]:
    return [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in regexes]


_BYTES: _Step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2: _Step = {**_BYTES, "use_regex": True}
_DIGITS: _Step = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class _Known:
    """A pre-tokenizer that llama.cpp has."""

    name: str
    steps: tuple[_Step, ...]
    ignore_merges: bool = False
    """Whether llama.cpp takes a whole word that is in the vocabulary before it looks at merges."""


KNOWN = (
    _Known("gpt-2", (_GPT2,)),
    _Known("llama-bpe", (*_split(_LLAMA3), _BYTES), ignore_merges=True),
    _Known("dbrx", (*_split(_LLAMA3), _BYTES)),
    _Known("qwen2", (*_split(QWEN2_REGEX), _BYTES)),
    _Known("smollm", (_DIGITS, _GPT2)),
    _Known("gpt-4o", (*_split(_GPT4O), _BYTES)),
    _Known("tekken", (*_split(_TEKKEN), _BYTES), ignore_merges=True),
    _Known("deepseek-v3", (*_split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), _BYTES)),
    _Known(
        "deepseek-llm",
        (*_split(r"[\r\n]", _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CHINESE), _DIGITS, _BYTES),
    ),
    _Known("deepseek-coder", (*_split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE), _DIGITS, _BYTES)),
    _Known(
        "qwen35",
        (
            *_split(
                rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
            ),
            _BYTES,
        ),
    ),
    _Known("ufakzeka", (*_split(rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"), _BYTES)),
    _Known("seed-coder", (*_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"), _BYTES)),
    _Known("minicpm5", (*_split(r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), _BYTES), ignore_merges=True),
    _Known("bloom", (*_split(r" ?[^(\s|.,!?…。，、।۔،)]+"), _BYTES)),
    _Known("viking", (*_split(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"), _BYTES)),
)
"""llama.cpp's byte-level pre-tokenizers by the rules they implement; the first of two equal ones is taken."""


def recognise(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE. Raises `UnsupportedModel` when it has none."""
    steps = _flatten(tokenizer.get("pre_tokenizer"))
    prefixed = [step for step in steps if step.get("type") == "ByteLevel" and step.get("add_prefix_space")]
    if prefixed:
        raise UnsupportedModel(
            "The tokenizer puts a space in front of every text (ByteLevel's add_prefix_space); "
            "llama.cpp does not do that for a byte-level vocabulary."
        )
    wanted = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    alike = [known for known in KNOWN if _spelling(known.steps) == _spelling(steps)]
    alike = alike or [known for known in KNOWN if _same_splits(known.steps, steps)]
    if not alike:
        raise UnsupportedModel(
            f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does: {_describe(steps)}.",
            hint="It has those of " + ", ".join(known.name for known in KNOWN) + ".",
        )
    for known in alike:
        if known.ignore_merges is wanted:
            return known.name
    if not _merges_reach_every_token(tokenizer["model"]):
        raise UnsupportedModel(
            f"The tokenizer sets ignore_merges to {wanted}, llama.cpp's {alike[0].name} does the opposite, "
            "and tokens of this vocabulary depend on it."
        )
    return alike[0].name


def _flatten(stage: Any) -> list[_Step]:
    if not isinstance(stage, Mapping):
        return []
    if stage.get("type") == "Sequence":
        return [step for part in stage.get("pretokenizers") or [] for step in _flatten(part)]
    return [dict(stage)]


def _spelling(steps: Sequence[_Step]) -> str:
    """`steps` written so that differences without a meaning are gone."""
    plain = []
    for step in steps:
        step = {key: value for key, value in step.items() if key != "trim_offsets"}
        if step.get("type") == "ByteLevel":
            step = {"type": "ByteLevel", "use_regex": step.get("use_regex", True)}
        elif step.get("type") == "Split":
            regex = (step.get("pattern") or {}).get("Regex")
            step = {**step, "pattern": {"Regex": str(regex).replace("\r", r"\r").replace("\n", r"\n")}}
        plain.append(step)
    return json.dumps(plain, sort_keys=True)


def _same_splits(known: Sequence[_Step], steps: Sequence[_Step]) -> bool:
    mine, theirs = _splitter(known), _splitter(steps)
    if mine is None or theirs is None:
        return False
    return all(mine.pre_tokenize_str(text) == theirs.pre_tokenize_str(text) for text in _sample_texts())


def _splitter(steps: Sequence[_Step]) -> Any:
    from tokenizers import Tokenizer

    blank = {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {}, "merges": []},
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**_BYTES, **step} if step.get("type") == "ByteLevel" else step for step in steps],
        },
    }
    try:
        return Tokenizer.from_str(json.dumps(blank)).pre_tokenizer
    except Exception as error:
        raise UnsupportedModel(f"tokenizer.json's pre_tokenizer cannot be read: {error}.") from error


_SAMPLES = (
    *"aZéßÉжЖ中あ한ªǅ_ʰ09٣Ⅷ²½.,'!?-/()[]\"#$+<=^~`|@🙂\u0301\u200d\u00a0\u3000\t\n\r\x00¡…",
    *("  ", " ", " ", "\n\n", "\r\n", "'s", "'LL", "'re", "'x", "word", "HTTPServer", "123", "4567", "don't", " the"),
)


def _sample_texts() -> list[str]:
    chance = random.Random(0)
    short = ["".join(pair) for pair in ((one, other) for one in _SAMPLES for other in _SAMPLES)]
    return short + ["".join(chance.choices(_SAMPLES, k=chance.randint(3, 12))) for _ in range(3000)]


def _merges_reach_every_token(model: Mapping[str, Any]) -> bool:
    """Whether merging alone makes each token of the vocabulary, so that ignore_merges does not matter."""
    from tokenizers import models

    plain = models.BPE(vocab=model["vocab"], merges=merge_pairs(model["merges"]))
    return all(len(plain.tokenize(token)) == 1 for token in model["vocab"])


def _describe(steps: Sequence[_Step]) -> str:
    parts = [str((step.get("pattern") or {}).get("Regex") or step.get("type")) for step in steps]
    return " then ".join(part if len(part) < 200 else part[:200] + "…" for part in parts) or "it does not split at all"
