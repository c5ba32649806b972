"""The vocabulary of a GGUF file as training asks for it: token ids are made by llama.cpp, as they will be in chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from edgetune.data import TextTokenizer
from edgetune.data.tokenizer import Text
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.fingerprint import text_sha256
from edgetune.gguf_header import read_gguf_header
from edgetune.template import Rendered


@dataclass(frozen=True)
class GgufTextTokenizer(TextTokenizer):
    """Text → token ids, with the engine's own tokenizer behind it."""

    inner: GgufTokenizer | None = None
    """The same vocabulary, for text that continues text: it puts no space in front."""
    path: Path | None = None
    """The file."""

    @property
    def _engine(self) -> GgufTokenizer:
        engine: GgufTokenizer = self.backend
        return engine

    def encode_all_parts(self, items: Sequence[tuple[Rendered, Sequence[int]]]) -> list[list[list[int]]]:
        """Ids of each rendering, apart at each of its splits."""
        parts = iter(self._encode_pieces([(rendered, splits) for rendered, splits in items if splits]))
        return [next(parts) if splits else [self._engine.encode_rendered(rendered)] for rendered, splits in items]

    def encode_texts(self, texts: Sequence[Text]) -> list[list[int]]:
        """Ids of each of `texts`."""
        known = {text: self._encode_text(text) for text in dict.fromkeys(texts)}
        return [known[text] for text in texts]

    def _encode_text(self, text: Text) -> list[int]:
        if text.continues and self.inner is not None:
            return self.inner.encode_piece(text.text, at_start=False)
        return self._engine.encode_piece(text.text, at_start=text.first)

    @cached_property
    def identity(self) -> str:
        """llama.cpp's version, and all that the file says of its vocabulary."""
        assert self.path is not None
        metadata = read_gguf_header(self.path, arrays=True).metadata
        known = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        return f"llama.cpp {version('llama-cpp-python')} {text_sha256(repr(sorted(known.items())))}"

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """What llama.cpp puts in front of every text, e.g. BOS."""
        bare, full = self._engine.encode("a", add_special=False), self._engine.encode("a")
        begin = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        return tuple(full[:begin])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens written out."""
        return self._engine.decode(ids, special=True).decode(errors="replace")

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of `ids` without control tokens."""
        return self._engine.decode(ids).decode(errors="replace")


def load_gguf_tokenizer(path: Path, *, chat_template: str | None = None, now: datetime | None = None) -> TextTokenizer:
    """The tokenizer of the GGUF at `path`; `chat_template` (Jinja source) replaces the file's own, `now` its date."""
    engine = GgufTokenizer.open(path)
    template = engine.build_template(chat_template) if chat_template is not None else engine.chat_template
    if template is not None and now is not None:
        template = replace(template, now=now)
    inner = GgufTokenizer.open(path, prefix_space="never")
    return GgufTextTokenizer(
        engine, engine.control_ids, engine.eos_id, engine.eog_ids, template, engine.strips, inner=inner, path=path
    )
