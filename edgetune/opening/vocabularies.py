"""A model's name → its vocabulary, as the engine that runs the model has it; no weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgetune.char_tokenizer import CharTokenizer
from edgetune.engine.json_tokenizer import JSON_KEY, JsonTokenizer
from edgetune.engine.tokenizer import GgufTokenizer
from edgetune.errors import UnsupportedError
from edgetune.events import Sink
from edgetune.export import check_convertible, find_base_dir
from edgetune.gguf_header import read_gguf_header
from edgetune.library import classify, find_model, purpose_of
from edgetune.opening.files import choose_model
from edgetune.piece_tokenizer import PieceTokenizer

Vocabulary = GgufTokenizer | JsonTokenizer | CharTokenizer | PieceTokenizer


@contextmanager
def open_vocabulary(model: str, *, sink: Sink) -> Iterator[Vocabulary]:
    """The vocabulary of `model`: llama.cpp's, or Hugging Face's own where the engine takes that.

    Raises `UsageError` for what is not there, `UnsupportedError` for a model that nothing here runs.
    """
    if directory := _left_to_torch(find_model(model)):
        yield _of_checkpoint(directory)
        return
    path = choose_model(model, (), sink=sink).base
    source = read_gguf_header(path, arrays=True).metadata.get(JSON_KEY)
    if isinstance(source, str) and source and purpose_of(path, "model") != "chat":
        yield JsonTokenizer(source)
        return
    own = GgufTokenizer.open(path)
    try:
        yield own
    finally:
        own.close()


def source_pieces(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """Each token of what the model reads as text for people."""
    if isinstance(vocabulary, CharTokenizer | PieceTokenizer):
        return [vocabulary.source_piece(token) for token in ids]
    return vocabulary.pieces(ids)


def _left_to_torch(path: Path) -> Path | None:
    """The checkpoint in or behind `path`, where llama.cpp has no graph for it."""
    base = find_base_dir(path) if classify(path) == "run" else path
    if not base.is_dir():
        return None
    try:
        check_convertible(base)
    except UnsupportedError:
        return base
    return None


def _of_checkpoint(directory: Path) -> Vocabulary:
    from edgetune.engine.torch.loading import load_vocabulary, require_torch

    require_torch()
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return load_vocabulary(directory, config, eog_ids=frozenset())
