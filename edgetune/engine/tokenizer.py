"""Text ↔ token ids exactly as the GGUF's vocabulary has it, with control tokens kept apart from text.

Message text is always tokenized as text; control tokens come from a rendered template alone (`encode_rendered`). Where
a converter recorded how the original tokenizer treats a prefix space and white space beside control tokens, that is
honoured, so that the ids equal Hugging Face's; other files are tokenized as llama.cpp itself does.
"""

from __future__ import annotations

import ctypes
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from edgetune.engine import native
from edgetune.engine.native import lib
from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, LongArray, read_gguf_header
from edgetune.template import ChatTemplate, Rendered, split_control

PREFIX_SPACE_KEY = "edgetune.tokenizer.prefix_space"
"""GGUF metadata: "never", "first" (at the start of a text), "always" (after every control token as well), or
"where_missing" (as "always", but for text that begins with a space)."""
RSTRIP_KEY = "edgetune.tokenizer.rstrip_tokens"
"""GGUF metadata: ids of control tokens that swallow the white space after them."""
LSTRIP_KEY = "edgetune.tokenizer.lstrip_tokens"
"""GGUF metadata: ids of control tokens that swallow the white space before them."""
NORMALIZER_KEY = "edgetune.tokenizer.normalizer"
"""GGUF metadata: the Unicode normal form ("NFC", …) a text is brought into first, which llama.cpp does not do."""
SPECIAL_TOKENS_KEY = "edgetune.tokenizer.special_tokens"
"""GGUF metadata: the special tokens a template may name, as JSON, where the ids in the file would say otherwise."""
TOOL_TEMPLATE_KEY = "tokenizer.chat_template.tool_use"
"""GGUF metadata: the template that messages with tools are rendered by, where the model has one of its own for them."""

_NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
_SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
    "cls_token": "tokenizer.ggml.cls_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
_SCORING = ("classification", "multilabel", "regression")
_META_SPACE = "▁"
_EVERYWHERE = ("always", "where_missing")


class GgufTokenizer:
    """The vocabulary of a GGUF file."""

    def __init__(self, vocab: Any, header: GgufHeader) -> None:
        """Wrap `vocab`, a live llama_vocab pointer loaded with `vocab_overrides(header)`."""
        self._vocab = vocab
        self._metadata = header.metadata
        self._model: Any = None
        self._pieces: dict[int, bytes] = {}
        self.n_vocab: int = lib.llama_vocab_n_tokens(vocab)
        self.bos_id = self._special_id(_SPECIAL_KEYS["bos_token"], lib.llama_vocab_bos(vocab))
        """None when the vocabulary has none; the same for `eos_id`."""
        self.eos_id = self._special_id(_SPECIAL_KEYS["eos_token"], lib.llama_vocab_eos(vocab))
        self.prefix_space = str(header.metadata.get(PREFIX_SPACE_KEY) or _llama_prefix_space(vocab, header))
        """Whether text gets a space in front; see `PREFIX_SPACE_KEY`."""

    @classmethod
    def open(cls, path: Path, *, prefix_space: str | None = None) -> GgufTokenizer:
        """Load the vocabulary alone of the GGUF model at `path`; `prefix_space` takes the place of its own setting."""
        header = load_header(path)
        check_is_model(header)
        if prefix_space is not None:
            header = replace(header, metadata={**header.metadata, PREFIX_SPACE_KEY: prefix_space})
        native.start(verbose=False)
        native.forget_errors()
        parameters = lib.llama_model_default_params()
        parameters.vocab_only = True
        overrides = vocab_overrides(header)
        parameters.kv_overrides = overrides
        model = lib.llama_model_load_from_file(native.path_bytes(path), parameters)
        if not model:
            raise native.failure(f"llama.cpp cannot read the vocabulary of {path}")
        tokenizer = cls(lib.llama_model_get_vocab(model), header)
        tokenizer._model = model
        return tokenizer

    def close(self) -> None:
        """Let go of the vocabulary, and free it if this tokenizer loaded it; what is not known yet is an error then."""
        if self._model is not None:
            lib.llama_model_free(self._model)
        self._vocab = self._model = None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`, whatever it spells: no control token is made from it.

        `add_special` adds what the model wants around a text, e.g. BOS.
        """
        return self._tokenize(self._with_prefix(text, at_start=True), add_special)

    def encode_piece(self, text: str, *, at_start: bool) -> list[int]:
        """Token ids of a piece of text: the first one, or one after a control token."""
        return self._tokenize(self._with_prefix(text, at_start=at_start), False) if text else []

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Token ids of a rendered template: its own control tokens as such, the messages' text as text."""
        pieces = split_control(rendered, self.control_tokens)
        ids: list[int] = []
        for index, (text, is_control) in enumerate(pieces):
            if is_control:
                ids.append(self._control_ids[text])
                continue
            if index and self._control_ids[pieces[index - 1][0]] in self._rstrip:
                text = text.lstrip()
            if index + 1 < len(pieces) and self._control_ids[pieces[index + 1][0]] in self._lstrip:
                text = text.rstrip()
            ids += self.encode_piece(text, at_start=not index)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The text of `ids` as bytes (UTF-8, possibly cut inside a character); `special` spells control tokens out."""
        text, at_start = b"", self.prefix_space != "never"
        for token in ids:
            is_control = token in self._control_texts
            piece = self.piece(token, special=special)
            text += piece.removeprefix(b" ") if at_start and not is_control else piece
            at_start = is_control and (at_start or self.prefix_space in _EVERYWHERE)
        return text

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `token` stands for; nothing for a control token unless `special`."""
        if special:
            return self._read_piece(token, special)
        if token not in self._pieces:
            self._pieces[token] = self._read_piece(token, special)
        return self._pieces[token]

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token as text for people; bytes that are no UTF-8 by themselves show as U+FFFD."""
        return [self.piece(token, special=True).decode(errors="replace") for token in ids]

    def speller(self, *, after: int) -> Callable[[int], bytes]:
        """Spells the tokens of a text, one by one as they come; `after` is the token it follows.

        The space that begins a text right after a control token may be the tokenizer's own, not the text's.
        """
        if not (self.prefix_space in _EVERYWHERE and after in self._control_texts):
            return self.piece
        is_first = True

        def spell(token: int) -> bytes:
            nonlocal is_first
            raw = self.piece(token)
            if is_first:
                is_first, raw = False, raw.removeprefix(b" ")
            return raw

        return spell

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends a turn or a text."""
        vocab = self._vocab
        named = (lib.llama_vocab_eot(vocab), lib.llama_vocab_fim_pad(vocab), lib.llama_vocab_fim_rep(vocab))
        candidates = {*self._control_texts, *named, lib.llama_vocab_fim_sep(vocab), lib.llama_vocab_eos(vocab)}
        return frozenset(token for token in candidates if token >= 0 and lib.llama_vocab_is_eog(vocab, token))

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """Texts of the tokens that are never made from a message's text."""
        return frozenset(self._control_texts.values())

    @cached_property
    def control_ids(self) -> dict[str, int]:
        """Their ids by their texts."""
        return self._control_ids

    @cached_property
    def strips(self) -> dict[str, tuple[bool, bool]]:
        """Control tokens that swallow white space: text → (before them, after them)."""
        return {
            text: (token in self._lstrip, token in self._rstrip)
            for text, token in self._control_ids.items()
            if token in self._lstrip or token in self._rstrip
        }

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template; None when the file has none."""
        source = self._metadata.get("tokenizer.chat_template")
        return self.build_template(str(source)) if source else None

    def build_template(self, source: str) -> ChatTemplate:
        """A chat template over this vocabulary from its Jinja `source`.

        One that is not the model's own takes the place of all of the model's, that for tools among them.
        """
        is_own = source == self._metadata.get("tokenizer.chat_template")
        for_tools = str(self._metadata.get(TOOL_TEMPLATE_KEY, "")) if is_own else ""
        if recorded := self._metadata.get(SPECIAL_TOKENS_KEY):
            special = json.loads(str(recorded))
        else:
            special = {
                name: self._text(token)
                for name, key in _SPECIAL_KEYS.items()
                if isinstance(token := self._metadata.get(key), int) and 0 <= token < self.n_vocab
            }
        return ChatTemplate(source, special, self.control_tokens, tool_source=for_tools)

    @cached_property
    def _normal_form(self) -> _NormalForm | None:
        recorded = self._metadata.get(NORMALIZER_KEY)
        return next((form for form in get_args(_NormalForm) if form == recorded), None)

    @cached_property
    def _control_texts(self) -> dict[int, str]:
        mask = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        attribute, vocab = lib.llama_vocab_get_attr, self._vocab
        return {token: self._text(token) for token in range(self.n_vocab) if attribute(vocab, token) & mask}

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        return {text: token for token, text in self._control_texts.items()}

    @cached_property
    def _rstrip(self) -> frozenset[int]:
        return self._stripping(RSTRIP_KEY, lib.LLAMA_TOKEN_ATTR_RSTRIP)

    @cached_property
    def _lstrip(self) -> frozenset[int]:
        return self._stripping(LSTRIP_KEY, lib.LLAMA_TOKEN_ATTR_LSTRIP)

    def _stripping(self, key: str, attribute: int) -> frozenset[int]:
        recorded = self._metadata.get(key)
        if isinstance(recorded, list):
            return frozenset(int(token) for token in recorded)
        if PREFIX_SPACE_KEY in self._metadata:
            return frozenset()
        return frozenset(
            token for token in self._control_texts if lib.llama_vocab_get_attr(self._vocab, token) & attribute
        )

    def _with_prefix(self, text: str, *, at_start: bool) -> str:
        # Of the others llama.cpp takes care; for these it was told not to (see `vocab_overrides`). As in Hugging Face's
        # Metaspace, a text that begins with a space gets no second one, nor does one that begins with an added token.
        wanted = self.prefix_space == "where_missing" or (self.prefix_space == "first" and at_start)
        if not wanted or not text or text.startswith((" ", _META_SPACE)):
            return text
        first = self._tokenize(text, False)[:1]
        attribute = lib.llama_vocab_get_attr(self._vocab, first[0]) if first else 0
        return text if attribute & lib.LLAMA_TOKEN_ATTR_USER_DEFINED else f" {text}"

    def _tokenize(self, text: str, add_special: bool) -> list[int]:
        self._check_open()
        if self._normal_form:
            text = unicodedata.normalize(self._normal_form, text)
        raw = text.encode("utf-8", "replace")
        if not raw and not add_special:
            return []
        size = len(raw) + 4
        while True:
            buffer = (lib.llama_token * size)()
            count = lib.llama_tokenize(self._vocab, raw, len(raw), buffer, size, add_special, False)
            if count >= 0:
                return list(buffer[:count])
            size = -count

    def _check_open(self) -> None:
        if self._vocab is None:
            raise UsageError("The model was closed, and its vocabulary with it.", hint="Open it again.")

    def _read_piece(self, token: int, special: bool) -> bytes:
        self._check_open()
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _special_id(self, key: str, found: int) -> int | None:
        # llama.cpp falls back to 11 in BPE vocabularies that name none; only SentencePiece has real defaults.
        is_spm = lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_SPM
        return found if found >= 0 and (key in self._metadata or is_spm) else None

    def _text(self, token: int) -> str:
        return bytes(lib.llama_vocab_get_text(self._vocab, token)).decode(errors="replace")


def check_is_model(header: GgufHeader) -> None:
    """Raise `UnsupportedError` when `header` is not that of a model with a vocabulary."""
    kind = header.metadata.get("general.type", "model")
    if kind == "adapter":
        raise UnsupportedError(
            f"{header.path} is an adapter, not a model.",
            hint=f"Give it with --lora {header.path}; the base model is found by itself, or name it before.",
        )
    if kind != "model" or header.array_length("tokenizer.ggml.tokens") is None:
        raise UnsupportedError(
            f"{header.path} is no language model: it has no vocabulary.", hint="Give a model's GGUF."
        )


def check_writes_text(header: GgufHeader) -> None:
    """Raise `UnsupportedError` when the model of `header` ends in classes, a value or an embedding."""
    task = header.metadata.get("edgetune.task")
    if task is None and header.metadata.get(f"{header.architecture}.attention.causal") is False:
        task = "embedding"
    verb = {"embedding": "embed"}.get(str(task), "classify" if task in _SCORING else "")
    if verb:
        raise UnsupportedError(
            f"{header.path} is made for {task}; it writes no text.", hint=f"Use it with edgetune {verb}."
        )


def vocab_overrides(header: GgufHeader) -> Any:
    """Metadata overrides to load the model of `header` with: llama.cpp must not add the prefix space that we add.

    Returns a ctypes array ended by an empty key, as llama.cpp wants it; keep it alive during the load.
    """
    overrides = (lib.llama_model_kv_override * 2)()
    if header.metadata.get(PREFIX_SPACE_KEY) in ("first", "where_missing", "never"):
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
        overrides[0].key = b"tokenizer.ggml.add_space_prefix"
        overrides[0].value.val_bool = False
    return overrides


def load_header(path: Path, *, keys: Sequence[str] = (RSTRIP_KEY, LSTRIP_KEY)) -> GgufHeader:
    """The header of `path`, with the arrays at `keys` read however long they are."""
    header = read_gguf_header(path)
    if any(isinstance(header.metadata.get(key), LongArray) for key in keys):
        return read_gguf_header(path, arrays=True)
    return header


def _llama_prefix_space(vocab: Any, header: GgufHeader) -> str:
    is_spm = lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_SPM
    adds = header.metadata.get("tokenizer.ggml.add_space_prefix", is_spm)
    return "always" if adds and is_spm else "never"
