"""A model opened for chatting: its engine, the adapters on it, and the template they were trained with.

Opens what the front end has resolved to files, refuses pairs that do not belong together, and switches adapters while
the conversation goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgetune.chat.conversation import Conversation
from edgetune.engine.llama import LlamaEngine
from edgetune.engine.protocol import LoraSpec
from edgetune.errors import UsageError
from edgetune.fingerprint import text_sha256
from edgetune.gguf_header import gguf_from_header, read_gguf_header
from edgetune.library import check_pair_headers, entry_name
from edgetune.template import ChatTemplate


class Session:
    """An open model with its adapters."""

    def __init__(self, engine: LlamaEngine, *, force: bool = False) -> None:
        """Take over `engine`; `force` lets adapters of another base on it, as far as their shapes fit."""
        self.engine = engine
        self._force = force

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's weights; empty when its file has none."""
        return gguf_from_header(read_gguf_header(self.engine.path)).fingerprint.weights

    @cached_property
    def vocabulary(self) -> str:
        """What tells the model's vocabulary from others."""
        header = read_gguf_header(self.engine.path)
        if known := gguf_from_header(header).fingerprint.tokenizer:
            return known
        tokens = read_gguf_header(self.engine.path, arrays=True).metadata.get("tokenizer.ggml.tokens")
        return text_sha256(repr(tokens))

    @property
    def name(self) -> str:
        """What the model goes by."""
        return self.engine.path.stem

    def converse(self, **settings: Any) -> Conversation:
        """A new conversation with it; `settings` are `Conversation`'s."""
        return Conversation(self.engine, **{"template": self.template, "vocabulary": self.vocabulary, **settings})

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template in force: the one an adapter was trained with, else the base's."""
        sources = {
            str(source)
            for adapter in self.engine.adapters
            if adapter.scale and (source := read_gguf_header(adapter.path).metadata.get("tokenizer.chat_template"))
        }
        if len(sources) == 1:
            return self.engine.tokenizer.build_template(sources.pop())
        return self.engine.tokenizer.chat_template

    def adapter_names(self) -> dict[str, LoraSpec]:
        """Name → adapter, for those that were given so far."""
        return {adapter_name(adapter.path): adapter for adapter in self.engine.adapters}

    def set_adapter(self, path: Path, scale: float) -> None:
        """Apply the adapter at `path` with `scale`, beside the others; 0 keeps it at hand and switches it off.

        Raises `MismatchError` for one that was trained on another base.
        """
        check_pair_headers(read_gguf_header(self.engine.path), read_gguf_header(path), force=self._force)
        others = [adapter for adapter in self.engine.adapters if adapter.path.resolve() != path.resolve()]
        self.engine.set_adapters([*others, LoraSpec(path, scale)])

    def switch_off(self, name: str = "") -> None:
        """Switch off the adapter called `name`, or all of them. Raises `UsageError` when there is no such adapter."""
        if name and name not in self.adapter_names():
            raise UsageError(
                f"No adapter {name!r} is loaded.", hint=f"Loaded: {', '.join(self.adapter_names()) or '-'}."
            )
        self.engine.set_adapters(
            [
                LoraSpec(adapter.path, 0.0) if name in ("", adapter_name(adapter.path)) else adapter
                for adapter in self.engine.adapters
            ]
        )


def open_session(base: Path, *, lora: Sequence[LoraSpec] = (), force: bool = False, **engine_options: Any) -> Session:
    """Open the GGUF model `base` with the adapters `lora`; `engine_options` are `LlamaEngine.open`'s.

    Raises `MismatchError` for an adapter of another base unless `force`; what would crash is refused all the same.
    """
    if lora:
        header = read_gguf_header(base)
        for adapter in lora:
            check_pair_headers(header, read_gguf_header(adapter.path), force=force)
    return Session(LlamaEngine.open(base, lora=lora, **engine_options), force=force)


def adapter_name(path: Path) -> str:
    """What an adapter goes by: its run's name for `adapter-F16.gguf`, else its file's."""
    return entry_name(path.resolve(), "adapter")
