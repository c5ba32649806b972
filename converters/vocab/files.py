"""The tokenizer files of a Hugging Face directory, read once: JSON as it is, and the added tokens of all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.errors import CorruptCheckpoint, UnsupportedModel


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the vocabulary's own rules apply."""

    id: int
    content: str
    special: bool = False
    """Left out of decoded text; never made from what a person writes."""
    lstrip: bool = False
    """Swallows the white space before it."""
    rstrip: bool = False
    """Swallows the white space after it."""
    normalized: bool = False
    """Matched in the text after the normalizer rather than in the text as written."""
    single_word: bool = False
    """Matched between word boundaries only."""
    is_listed: bool = True
    """Whether a file lists it as added; else it is a SentencePiece piece, or named (as "unk_token") alone."""


class TokenizerFiles:
    """What a model directory says of its tokenizer."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.tokenizer = self.read_json("tokenizer.json")
        """tokenizer.json, empty when there is none; `read_vocabulary` replaces it by what transformers makes of it."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty when there is none."""
        return self.read_json("tokenizer_config.json")

    @cached_property
    def legacy_special_tokens(self) -> dict[str, Any]:
        """special_tokens_map.json, which transformers reads where tokenizer_config.json lists no added tokens."""
        return {} if "added_tokens_decoder" in self.config else self.read_json("special_tokens_map.json")

    def token_ids(self, vocabulary: object) -> dict[str, int]:
        """Every token's id by its text: those of `vocabulary`, a mapping, and the added tokens."""
        known = {str(text): int(number) for text, number in vocabulary.items()} if isinstance(vocabulary, dict) else {}
        return {**known, **{token.content: number for number, token in self.added_tokens.items()}}

    def has(self, name: str) -> bool:
        """Whether the directory holds the file `name`."""
        return (self.model_dir / name).is_file()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when the file does not exist. Raises `CorruptCheckpoint` when it is broken."""
        path = self.model_dir / name
        if not path.is_file():
            return {}
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise CorruptCheckpoint(f"{path} is not valid JSON: {error}.", hint="Download it again.") from error
        if not isinstance(values, dict):
            raise CorruptCheckpoint(f"{path} does not hold a JSON object.", hint="Download it again.")
        return values

    @cached_property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Every added token by id, from tokenizer.json, added_tokens.json and tokenizer_config.json."""
        added: dict[int, AddedToken] = {}
        try:
            for entry in self.tokenizer.get("added_tokens") or []:
                added[int(entry["id"])] = _added_token(int(entry["id"]), entry)
            for content, token_id in self.read_json("added_tokens.json").items():
                added.setdefault(int(token_id), AddedToken(int(token_id), str(content)))
            for token_id, entry in (self.config.get("added_tokens_decoder") or {}).items():
                added[int(token_id)] = _added_token(int(token_id), entry)
            # transformers matches a named token in texts also where no list has it.
            vocabulary = (self.tokenizer.get("model") or {}).get("vocab")
            if isinstance(vocabulary, list):  # of a unigram model: [piece, score] pairs
                vocabulary = {str(piece[0]): number for number, piece in enumerate(vocabulary)}
            known: dict[str, int] = vocabulary if isinstance(vocabulary, dict) else {}
            if known:
                _require_assigned_ids(added.values(), known)
            for text in self._named_special_tokens() & known.keys():
                added.setdefault(known[text], AddedToken(known[text], text, is_listed=False))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(f"{self.model_dir} has a broken list of added tokens: {error!r}.") from error
        special = self._named_special_tokens()
        return {
            number: replace(token, special=True) if token.content in special else token
            for number, token in sorted(added.items())
        }

    def _named_special_tokens(self) -> set[str]:
        """Contents that tokenizer_config.json names as special, which makes them so whatever tokenizer.json says."""
        named = [value for key, value in self.config.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = self.config.get(key) or []
            named += list(more.values()) if isinstance(more, Mapping) else list(more)
        return {text for text in map(token_text, named) if text}


def normalizer_steps(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The normalizers one after the other, sequences opened."""
    stage = tokenizer.get("normalizer")
    if not isinstance(stage, dict):
        return []
    return list(stage.get("normalizers") or []) if stage.get("type") == "Sequence" else [stage]


def token_text(entry: object) -> str | None:
    """The text of a token as tokenizer_config.json names it: a string, or an object with its "content"."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _require_assigned_ids(listed: Iterable[AddedToken], vocabulary: Mapping[str, int]) -> None:
    """Refuse listed ids that are not the ones Hugging Face gives out: it numbers new tokens without gaps."""
    given: dict[str, int] = {}
    following = len(vocabulary)
    for token in listed:
        expected = given.get(token.content, vocabulary.get(token.content, following))
        if token.id != expected:
            raise UnsupportedModel(
                f"The added token {token.content!r} is listed with the id {token.id}, but transformers numbers added "
                f"tokens without gaps and gives it the id {expected}.",
                hint="Fill the gap with added tokens that are never used, so that every id is as the model knows it.",
            )
        given[token.content] = expected
        following = max(following, expected + 1)


def _added_token(number: int, entry: Mapping[str, Any]) -> AddedToken:
    flags = {key: bool(entry.get(key)) for key in ("special", "lstrip", "rstrip", "normalized", "single_word")}
    return AddedToken(number, str(entry["content"]), is_listed=not entry.get("is_piece"), **flags)
