"""Encoders through llama.cpp: batches of whole texts in, hidden states out; pooling and head are computed here.

llama.cpp's attention runs over a whole micro-batch under a mask, so few short texts at a time are fastest. Its graphs
give every token the first token type: a second text's tokens go in as vectors that make up for it. Decoders are read
from the states below their vocabulary head.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.backends import list_devices
from edgetune.engine.encoder import Encoder, Profile, check_heads, with_adapter_heads
from edgetune.engine.encoder_context import MOST_SEQUENCES, EncoderContext
from edgetune.engine.encoder_tokens import Encoded, EncoderTokenizer, JsonEncoderTokenizer, LlamaEncoderTokenizer
from edgetune.engine.json_tokenizer import JSON_KEY
from edgetune.engine.loading import FlashAttention, gpu_layers_for, load_weights
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header
from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors
from edgetune.hardware import available_memory, physical_cores
from edgetune.head import LLAMA_POOLINGS, Array, Head, Pooling, pool, read_head
from edgetune.sentence_modules import read_prompting

_BATCH_TOKENS = 256
"""Measured best on CPU cores with texts of 5 to 250 tokens."""
_CONTEXTS_BYTES = 512 << 20
"""What the contexts that compute at the same time may take, and of free memory no more than an eighth."""
_LONGEST_DECODER_TEXT = 8192
"""A decoder's context is often far longer than memory for one evaluation of it."""


class LlamaBackend:
    """A GGUF model and as many contexts of it as batches are computed at once; see `encoder.Backend`."""

    pads = False
    batch_tokens = _BATCH_TOKENS
    most_texts = MOST_SEQUENCES

    def __init__(
        self,
        model: Any,
        header: GgufHeader,
        profile: Profile,
        *,
        threads: int,
        flash_attn: FlashAttention,
        tap: Tap | None = None,
        on_gpu: bool = False,
    ) -> None:
        """Take over `model`; use `open_llama_encoder`."""
        self._model, self._header = model, header
        self._threads = threads or physical_cores()
        self._is_decoder = not profile.is_encoder
        self._make_context = partial(
            EncoderContext, model, profile.path, is_decoder=self._is_decoder, flash_attn=flash_attn, tap=tap
        )
        self._idle: list[EncoderContext] = []
        self._thread = threading.local()
        self._adapters = LoadedAdapters(model, header)
        self._adapter_key: AdapterKey = ()
        self._tables: _Tables | None = None
        self.profile = profile
        """What the model is for."""
        # A decoder's context is large, and its matrices wide enough to keep all cores at work.
        is_alone = self._is_decoder or on_gpu or tap is not None
        self.workers = 1 if is_alone else min(self._threads, _contexts_that_fit(model))
        """How many batches are best computed at once."""

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Run under these adapters from now on. Raises `MismatchError`, `UnsupportedError`, `UsageError`."""
        self._adapter_key = self._adapters.load(adapters)
        self._tables = None if self._is_decoder else _Tables(self._header, self._adapter_key)

    def pool(self, batch: Sequence[Encoded], pooling: Pooling | None) -> Array:
        """Pooled last hidden states, (n, hidden); None is the model's own pooling."""
        return pool(self._states(batch), [len(one) for one in batch], pooling or self.profile.pooling)

    def score(self, batch: Sequence[Encoded]) -> Array:
        """What the head makes of the texts, (n, outputs)."""
        head = self.profile.head
        assert head is not None
        return head.apply(self.pool(batch, head.pooling or self.profile.pooling))

    def share(self, workers: int) -> Callable[[], object]:
        """What a thread calls to have its share of this one's cores, as one of so many workers."""
        return partial(setattr, self._thread, "cores", max(1, self._threads // workers))

    def close(self) -> None:
        """Free the model."""
        while self._idle:
            self._idle.pop().close()
        if self._model is not None:
            lib.llama_model_free(self._model)
        self._model = None

    def _states(self, batch: Sequence[Encoded]) -> Array:
        """Hidden states of the batch's tokens, one text after the other."""
        if self._model is None:
            raise UsageError(f"{self.profile.path} was closed.", hint="Open it again.")
        tables = self._tables if self._tables and self._tables.tells_types else None
        vectors = tables.vectors(batch) if tables and any(one.types for one in batch) else None
        cores = getattr(self._thread, "cores", self._threads)
        try:
            context = self._idle.pop()
        except IndexError:
            context = self._make_context()
        try:
            return context.states(batch, vectors, adapters=self._adapters, key=self._adapter_key, threads=cores)
        finally:
            self._idle.append(context)


def _contexts_that_fit(model: Any) -> int:
    """llama.cpp keeps room for logits of every token of a batch, although an encoder has none."""
    logits: int = 4 * _BATCH_TOKENS * lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return max(1, min(_CONTEXTS_BYTES, available_memory() // 8) // logits)


class _Tables:
    """Token vectors in which the second text's token type stands in place of the first's, which llama.cpp adds."""

    def __init__(self, header: GgufHeader, adapters: AdapterKey) -> None:
        self._tensors = GgufTensors(header)
        self.tells_types = "token_types.weight" in self._tensors and self._tensors.shape("token_types.weight")[0] > 1
        """Whether the model tells two texts apart by token types."""
        if self.tells_types:
            first, second = self._tensors.rows("token_types.weight", 0, 2)
            self._difference = second - first
        self._updates = [_EmbeddingUpdate(key[0], scale) for key, scale in adapters]

    def vectors(self, batch: Sequence[Encoded]) -> Array:
        """(tokens, hidden) for the tokens of the batch, one text after the other."""
        ids = np.concatenate([np.asarray(one.ids) for one in batch])
        types = np.concatenate([np.asarray(one.types if one.types else [0] * len(one)) for one in batch])
        distinct, places = np.unique(ids, return_inverse=True)
        rows = self._tensors.take("token_embd.weight", distinct.tolist())
        for update in self._updates:
            rows = update.add_to(rows, distinct.tolist())
        return np.ascontiguousarray(rows[places] + (types == 1)[:, None] * self._difference, np.float32)


class _EmbeddingUpdate:
    """What an adapter adds to rows of the token embedding, which llama.cpp does for token ids only."""

    def __init__(self, path: Path, scale: float) -> None:
        header = read_gguf_header(path)
        self._tensors = GgufTensors(header)
        self._name = "token_embd.weight.lora_a"
        alpha = header.metadata.get("adapter.lora.alpha", 0.0)
        self._alpha = float(alpha) if isinstance(alpha, int | float) else 0.0
        self._scale = scale

    def add_to(self, rows: Array, ids: list[int]) -> Array:
        if self._name not in self._tensors:
            return rows
        up = self._tensors.read("token_embd.weight.lora_b")  # (hidden, rank)
        scale = self._scale * (self._alpha / up.shape[1] if self._alpha else 1.0)
        return np.asarray(rows + scale * (self._tensors.take(self._name, ids) @ up.T), np.float32)


def open_llama_encoder(
    path: Path,
    *,
    lora: Sequence[LoraSpec] = (),
    threads: int = 0,
    gpu_layers: int = -1,
    flash_attn: FlashAttention = "auto",
    tap: Tap | None = None,
    verbose: bool = False,
) -> Encoder:
    """Open the GGUF model at `path` for vectors and, where it or an adapter has a head, for labels.

    `tap` looks into the graph and must outlive the encoder. Raises `CorruptFileError`, `UnsupportedError` for a model
    that gives no hidden states of texts, `MismatchError` for an adapter of another model.
    """
    header = load_header(path)
    check_is_model(header)
    native.start(verbose=verbose)
    head = read_head(header)
    gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
    on_gpu = gpu_layers_for(header, gpu_layers, 0, gpus) if gpus else 0
    model = _load(path, header, gpu_layers=on_gpu)
    tokenizer: EncoderTokenizer | None = None
    try:
        profile = _profile(header, head, is_encoder=_is_encoder(header))
        heads = {spec.path: read_head(spec.path) for spec in lora if spec.scale}
        check_heads(lora, lambda path: bool((found := heads[path]) and found.layers))
        profile = with_adapter_heads(profile, heads.values())
        options: dict[str, Any] = {"threads": threads, "flash_attn": flash_attn, "tap": tap}
        backend = LlamaBackend(model, header, profile, on_gpu=on_gpu > 0, **options)
        backend.set_adapters(lora)
        tokenizer = _open_tokenizer(path, header)
    except BaseException:
        lib.llama_model_free(model)
        raise
    return Encoder(backend, tokenizer)


def _load(path: Path, header: GgufHeader, *, gpu_layers: int) -> Any:
    model = load_weights(path, header, gpu_layers=gpu_layers)
    if lib.llama_model_has_encoder(model) and lib.llama_model_has_decoder(model):
        lib.llama_model_free(model)
        raise UnsupportedError(
            f"{path} turns one text into another; it gives no vector or label of a text.",
            hint="Run it with: edgetune generate",
        )
    return model


def _profile(header: GgufHeader, head: Head | None, *, is_encoder: bool) -> Profile:
    hidden = header.number("embedding_length") or 0
    context = header.number("context_length") or 512
    prompting = read_prompting(header)
    limit = min(context, prompting.max_tokens or context)
    for_vectors = head is not None and head.task == "embedding"
    if head is not None:
        head.check_width(hidden, header.path)
    recorded = LLAMA_POOLINGS.get(header.number("pooling_type") or 0) if head is None or for_vectors else None
    if recorded and head is None and not is_encoder:
        # A decoder's file names a pooling where the model was made for vectors.
        head = Head("embedding", pooling=recorded, normalize=True)
    pooling: Pooling = (
        (head.pooling if for_vectors and head else None) or recorded or ("mean" if is_encoder else "last")
    )
    return Profile(
        path=header.path,
        hidden_size=hidden,
        max_tokens=limit if is_encoder else min(limit, _LONGEST_DECODER_TEXT),
        head=head,
        pooling=pooling,
        # What is not from here says nothing about it, and is mostly meant to be compared by cosine.
        normalize=head.normalize if head is not None else True,
        is_encoder=is_encoder,
        prompts=prompting.prompts,
        default_prompt=prompting.default_prompt,
        has_foreign_head=head is None and any(tensor.name == "cls.output.weight" for tensor in header.tensors),
    )


def _is_encoder(header: GgufHeader) -> bool:
    """Whether a token sees those after it; the names are llama.cpp's own rule for files that do not say."""
    causal = header.metadata.get(f"{header.architecture}.attention.causal")
    return causal is False or "bert" in header.architecture or header.architecture == "t5encoder"


def _open_tokenizer(path: Path, header: GgufHeader) -> EncoderTokenizer:
    source = header.metadata.get(JSON_KEY)
    if isinstance(source, str) and source:
        return JsonEncoderTokenizer(source)
    return LlamaEncoderTokenizer(GgufTokenizer.open(path), is_encoder=_is_encoder(header))
