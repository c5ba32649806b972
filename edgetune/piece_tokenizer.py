"""Marian's and M2M100's vocabularies: SentencePiece files, and a vocab.json that numbers their pieces by itself.

Marian (opus-mt) has a file for sources and one for targets, M2M100 one for both and a token for the language in front
of every text. Neither has a tokenizer.json, nor could it: its numbers are not SentencePiece's. What a person writes is
text: none of it becomes an end, padding or a language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.errors import CorruptFileError
from edgetune.languages import find_language

_SPACE = "\u2581"
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
_MARK = re.compile(">>(.+)<<")
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_HINT = "Get the model's files again."


@dataclass(frozen=True)
class PieceTokenizer:
    """Pieces of text ↔ ids, equal to those of transformers' `MarianTokenizer` and `M2M100Tokenizer`."""

    source: Any
    """SentencePiece's processor for sources, and for what is decoded where both sides share their ids."""
    target: Any
    """The one for targets."""
    source_ids: Mapping[str, int]
    """vocab.json."""
    target_ids: Mapping[str, int]
    """The same, but for models with target_vocab.json."""
    control_ids: Mapping[str, int]
    """Texts of the tokens that no text is made of."""
    eos_id: int
    unk_id: int
    marks: Mapping[str, int] = field(default_factory=dict)
    """Marian's target languages by name, each a token in front of the source; empty where there is but one."""
    codes: Mapping[str, int] = field(default_factory=dict)
    """M2M100's languages, each a token in front of the texts that are in it."""
    own_code: int | None = None
    """The one in front of a source whose language nobody names."""

    @property
    def languages(self) -> Mapping[str, int]:
        """Names of languages and their ids."""
        return self.codes or self.marks

    @property
    def marks_language_before(self) -> bool | None:
        """Whether a target begins with its language's code; None where codes are not around texts."""
        return True if self.codes else None

    @property
    def reads_target_language(self) -> bool:
        """Whether the target's language stands in front of the source."""
        return bool(self.marks)

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that no text is made of."""
        return frozenset(self.control_ids)

    @property
    def eog_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset({self.eos_id})

    @property
    def chat_template(self) -> None:
        """There is none."""
        return None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a source; `add_special` puts the end after it, and M2M100's code before it."""
        ids = self._ids(self.source, text, self.source_ids)
        return [*([] if self.own_code is None else [self.own_code]), *ids, self.eos_id] if add_special else ids

    def encode_source(self, text: str, *, language: str = "") -> list[int]:
        """As `encode`, with the token of `language` in front. Raises `UsageError` for one that the model lacks."""
        before = self.own_code if not language else self.languages[find_language(language, self.languages)]
        return [*([] if before is None else [before]), *self.encode(text, add_special=False), self.eos_id]

    def encode_target(self, text: str) -> list[int]:
        """Ids of a target as it is learned: the end after it."""
        return [*self._ids(self.target, text, self.target_ids), self.eos_id]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The target text of `ids`; `special` spells control tokens out."""
        return self._decode(ids, special=special).encode()

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """What the target token stands for in the middle of a text; nothing for a control token unless `special`."""
        return self._piece(self._targets.get(token, ""), special=special)

    def source_piece(self, token: int) -> str:
        """The text of a token of the source."""
        return self._piece(self._sources.get(token, ""), special=True).decode(errors="surrogateescape")

    def speller(self, *, after: int) -> Callable[[int], bytes]:
        """Spells the tokens of a text one by one; a character spread over several comes with its last token."""
        seen: list[int] = []
        told, waiting = "", 0

        def spell(token: int) -> bytes:
            nonlocal told, waiting
            seen.append(token)
            text, before = self._decode(seen), told
            waiting += 1
            if text.endswith(_UNFINISHED) and waiting < _LONGEST_CHARACTER:
                return b""
            told, waiting = text, 0
            return text.removeprefix(before).encode()

        return spell

    def _ids(self, processor: Any, text: str, ids: Mapping[str, int]) -> list[int]:
        pieces = processor.encode(text, out_type=str)
        return [self.unk_id if piece in self._unwritten else ids.get(piece, self.unk_id) for piece in pieces]

    def _decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """As transformers does: SentencePiece joins what is between control tokens."""
        parts: list[list[str]] = [[]]
        text = ""
        for token in ids:
            piece = self._targets.get(token, "")
            if piece not in self.control_ids:
                parts[-1].append(piece)
            elif special:
                text += self._joined(parts[-1]) + piece
                parts[-1] = []
        return f"{text}{self._joined(parts[-1])}".replace(_SPACE, " ").strip()

    def _joined(self, pieces: list[str]) -> str:
        shared = self.source_ids is self.target_ids
        return str((self.source if shared else self.target).decode_pieces(pieces))

    def _piece(self, piece: str, *, special: bool) -> bytes:
        if piece in self.control_ids:
            return piece.encode() if special else b""
        found = _BYTE.fullmatch(piece)
        return bytes.fromhex(found[1]) if found else piece.replace(_SPACE, " ").encode()

    @cached_property
    def _unwritten(self) -> frozenset[str]:
        # A run of characters that SentencePiece does not know is one piece, which may spell such a token.
        return self.control_tokens.union(f">>{name}<<" for name in self.marks)

    @cached_property
    def _targets(self) -> dict[int, str]:
        return {index: piece for piece, index in (*self.target_ids.items(), *self.codes.items())}

    @cached_property
    def _sources(self) -> dict[int, str]:
        return {index: piece for piece, index in (*self.source_ids.items(), *self.codes.items())}


def load_pieces(model_dir: Path) -> PieceTokenizer | None:
    """The vocabulary of `model_dir` where it is one of these; None for others. Raises `CorruptFileError`."""
    if (model_dir / "tokenizer.json").is_file() or not (model_dir / "vocab.json").is_file():
        return None
    settings, config = (
        _values(model_dir / name) if (model_dir / name).is_file() else {}
        for name in ("tokenizer_config.json", "config.json")
    )
    both = [model_dir / name for name in ("source.spm", "target.spm")]
    if all(path.is_file() for path in both):
        return _marian(model_dir, settings, (_processor(both[0]), _processor(both[1])))
    shared = model_dir / "sentencepiece.bpe.model"
    names = (settings.get("tokenizer_class"), config.get("model_type"))
    if not shared.is_file() or not {"M2M100Tokenizer", "m2m_100"}.intersection(names):
        return None
    return _m2m100(model_dir, settings, _processor(shared))


def _marian(model_dir: Path, settings: Mapping[str, Any], processors: tuple[Any, Any]) -> PieceTokenizer:
    ids = _vocabulary(model_dir / "vocab.json")
    if settings.get("separate_vocabs"):
        targets, marks = _vocabulary(model_dir / "target_vocab.json"), dict[str, int]()
    else:
        targets, marks = ids, {found[1]: index for text, index in ids.items() if (found := _MARK.fullmatch(text))}
    controls, end, unknown = _controls(model_dir, settings, ids)
    return PieceTokenizer(*processors, ids, targets, controls, end, unknown, marks)


def _m2m100(model_dir: Path, settings: Mapping[str, Any], processor: Any) -> PieceTokenizer:
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    ids = _vocabulary(model_dir / "vocab.json")
    known = FAIRSEQ_LANGUAGE_CODES.get(str(settings.get("language_codes") or "m2m100"), [])
    codes = {f"__{code}__": len(ids) + place for place, code in enumerate(known)}
    controls, end, unknown = _controls(model_dir, settings, ids)
    own = codes.get(f"__{settings.get('src_lang') or 'en'}__")
    if own is None:
        raise CorruptFileError(f"{model_dir / 'tokenizer_config.json'} names languages that are unknown.", hint=_HINT)
    return PieceTokenizer(
        processor, processor, ids, ids, {**controls, **codes}, end, unknown, codes=codes, own_code=own
    )


def _controls(model_dir: Path, settings: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[dict[str, int], int, int]:
    """The control tokens, and which of them end a text and stand for what the vocabulary lacks."""
    names = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>", "bos": "<s>"}
    for name in names:
        given = settings.get(f"{name}_token")
        names[name] = str((given.get("content") if isinstance(given, dict) else given) or names[name])
    found = {text: ids[text] for text in names.values() if text in ids}
    if missing := [names[name] for name in ("eos", "unk") if names[name] not in found]:
        raise CorruptFileError(f"{model_dir / 'vocab.json'} has no {missing[0]}.", hint=_HINT)
    return found, found[names["eos"]], found[names["unk"]]


def _processor(path: Path) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise CorruptFileError(f"{path} is no SentencePiece model.", hint=_HINT) from error
    return processor


def _vocabulary(path: Path) -> dict[str, int]:
    values = _values(path)
    if not values or not all(type(index) is int for index in values.values()):
        raise CorruptFileError(f"{path} does not number pieces of text.", hint=_HINT)
    return values


def _values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}.", hint=_HINT) from error
    return values if isinstance(values, dict) else {}
