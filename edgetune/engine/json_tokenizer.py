"""Text ↔ token ids with the `tokenizers` library, from the text of a tokenizer.json: ids are Hugging Face's own.

For encoders and encoder-decoders, whose GGUF files carry that text, and for models that run in torch. What a person
writes is text: it never becomes a control token, whatever it spells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgetune.errors import CorruptFileError
from edgetune.languages import find_language, language_codes
from edgetune.plain_text import text_only

if TYPE_CHECKING:
    from edgetune.template import ChatTemplate, Rendered

JSON_KEY = "tokenizer.huggingface.json"
"""GGUF metadata: the text of the original tokenizer.json."""
_UNFINISHED = "\ufffd"
_LONGEST_CHARACTER = 4
"""Tokens that one character may be spread over: its bytes in UTF-8."""


def _byte_alphabet() -> str:
    """GPT-2's sign for every byte: printable ones are themselves, the others follow from 256 on."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in own else next(others)) for byte in range(256))


_ALPHABET = _byte_alphabet()


class JsonTokenizer:
    """The vocabulary that a tokenizer.json describes."""

    def __init__(
        self, source: str, *, eog_ids: Iterable[int] = (), special_texts: Mapping[str, str] | None = None
    ) -> None:
        """`source` is the file's text; `eog_ids` end a text; `special_texts` are what templates name ("eos_token").

        Raises `CorruptFileError` when it cannot be read.
        """
        self._backend, self._reader = load_backends(source)
        self.eog_ids = frozenset(eog_ids)
        """The tokens that end a text."""
        self.special_texts = dict(special_texts or {})
        """Names of special tokens, as templates use them, and their texts."""
        self.chat_template: ChatTemplate | None = None
        """A tokenizer.json has none."""
        self._pieces: dict[int, bytes] = {}

    @property
    def n_vocab(self) -> int:
        """Entries of the vocabulary, the added tokens among them."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, pair: str | None = None, *, add_special: bool = True) -> list[int]:
        """Token ids of `text` (and of `pair` after it), no control token made from them.

        `add_special` adds what the model wants around a text, e.g. [CLS] and [SEP].
        """
        return list(self._reader.encode(text, pair, add_special_tokens=add_special).ids)

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Token ids of a rendered template: its own control tokens as such, the messages' text as text."""
        from edgetune.template import split_control

        ids: list[int] = []
        for text, is_control in split_control(rendered, frozenset(self._control_ids)):
            ids += [self._control_ids[text]] if is_control else self.encode(text, add_special=False)
        return ids

    @property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that are never made from a message's text."""
        return frozenset(self._control_ids)

    def takes_space_before(self, text: str) -> bool:
        """Whether the control token called `text` stands for the space before it as well."""
        token = self._backend.get_added_tokens_decoder().get(self._control_ids.get(text))
        return token is not None and bool(token.lstrip)

    def encode_source(self, text: str, *, language: str = "") -> list[int]:
        """As `encode`, with the code of `language`, where one is named, in the place of the tokenizer's own."""
        ids = self.encode(text)
        if not language:
            return ids
        code = self.languages[find_language(language, self.languages)]
        own = self._language_around
        assert own is not None
        return [code, *ids[1:]] if own == "before" else [*ids[:-1], code]

    @property
    def marks_language_before(self) -> bool | None:
        """Whether a text's language code stands before it (mBART-50) or at its end (mBART-25); None for neither."""
        return None if self._language_around is None else self._language_around == "before"

    @cached_property
    def languages(self) -> dict[str, int]:
        """Language codes and their ids; none where the tokenizer does not put one beside a text."""
        return self._codes if self._language_around else {}

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The text of `ids` in UTF-8; `special` spells control tokens out."""
        return self._decode(list(ids), special=special).encode()

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """What `token` stands for in the middle of a text; nothing for a control token unless `special`.

        The bytes of one that is a part of a character.
        """
        if token in self._control_texts:
            return self._control_texts[token].encode() if special else b""
        if token not in self._pieces:
            before = self._decode([self._anchor])
            text = self._decode([self._anchor, token]).removeprefix(before)
            raw = self._bytes(token) if _UNFINISHED in text else None
            self._pieces[token] = text.encode() if raw is None else raw
        return self._pieces[token]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as text for people; bytes that are no UTF-8 by themselves show as U+FFFD."""
        return [self.piece(token, special=True).decode(errors="replace") for token in ids]

    def speller(self, *, after: int) -> Callable[[int], bytes]:
        """Spells the tokens of a text one by one; a character spread over several comes with its last token."""
        seen: list[int] = []
        start = read = 0

        def spell(token: int) -> bytes:
            nonlocal start, read
            if token in self._control_texts:
                return b""
            seen.append(token)
            before, text = self._decode(seen[start:read]), self._decode(seen[start:])
            if text.endswith(_UNFINISHED) and len(seen) - read < _LONGEST_CHARACTER:
                return b""
            start, read = read, len(seen)
            return text.removeprefix(before).encode()

        return spell

    def _bytes(self, token: int) -> bytes | None:
        """The bytes that the vocabulary's entry spells, of SentencePiece ("<0xE2>") or in GPT-2's alphabet."""
        entry = str(self._backend.id_to_token(token))
        if found := re.fullmatch("<0x([0-9A-F]{2})>", entry):
            return bytes.fromhex(found[1])
        return bytes(map(_ALPHABET.index, entry)) if set(entry) <= set(_ALPHABET) else None

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=not special))

    @cached_property
    def _control_texts(self) -> dict[int, str]:
        added = self._backend.get_added_tokens_decoder().items()
        return {index: token.content for index, token in added if token.special}

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {text: index for index, text in self._control_texts.items()}

    @cached_property
    def _codes(self) -> dict[str, int]:
        return language_codes(self._control_ids.items())

    @cached_property
    def _language_around(self) -> str | None:
        around = self.encode("")
        if around and around[0] in self._codes.values():
            return "before"
        return "after" if around and around[-1] in self._codes.values() else None

    @cached_property
    def _anchor(self) -> int:
        """A token that stands for plain text, to see what others look like after it."""
        return next((token for token in reversed(self.encode("a b", add_special=False))), 0)


def load_backend(source: str) -> Any:
    """A `tokenizers.Tokenizer` from a tokenizer.json's text, which cuts and pads nothing and takes all text for text.

    Raises `CorruptFileError` when it cannot be read.
    """
    return load_backends(source)[1]


def load_backends(source: str) -> tuple[Any, Any]:
    """One to decode with and to ask for names, and `load_backend`'s, to whom control tokens have names without a use.

    They are the same where the model in it makes no control token of a text.
    """
    from tokenizers import Tokenizer

    try:
        values = json.loads(source)
        values["truncation"] = values["padding"] = None
        names = reader = Tokenizer.from_str(json.dumps(values))
        plain = text_only(
            values, {token["content"] for token in values.get("added_tokens") or [] if token.get("special")}
        )
        if plain["model"]["vocab"] is not values["model"]["vocab"]:
            reader = Tokenizer.from_str(json.dumps(plain))
        # The post-processor still puts control tokens around a text.
        reader.encode_special_tokens = True
    except Exception as error:  # The library raises nothing more specific for a file it cannot read.
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CorruptFileError(f"The tokenizer.json cannot be read: {reason}.", hint="Get it again.") from error
    return names, reader
