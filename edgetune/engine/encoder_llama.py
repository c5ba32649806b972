"""Encoders through llama.cpp: batches of whole texts in, hidden states out; pooling and head are computed here.

llama.cpp's attention runs over a whole micro-batch under a mask, so few short texts at a time are fastest. Its graphs
give every token the first token type: a second text's tokens go in as vectors that make up for it. Decoders are read
from the states below their vocabulary head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.engine import native
from edgetune.engine.adapters import LoadedAdapters
from edgetune.engine.backends import list_devices
from edgetune.engine.batch import Batch
from edgetune.engine.encoder import Encoder, Profile, check_heads, with_adapter_head
from edgetune.engine.encoder_tokens import Encoded, EncoderTokenizer, JsonEncoderTokenizer, LlamaEncoderTokenizer
from edgetune.engine.json_tokenizer import JSON_KEY
from edgetune.engine.loading import FLASH_ATTENTION, FlashAttention, gpu_layers_for, load_weights
from edgetune.engine.native import AdapterKey, lib
from edgetune.engine.protocol import LoraSpec
from edgetune.engine.tap import Tap
from edgetune.engine.tokenizer import GgufTokenizer, check_is_model, load_header
from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, read_gguf_header
from edgetune.gguf_tensors import GgufTensors
from edgetune.hardware import physical_cores
from edgetune.head import LLAMA_POOLINGS, Array, Head, Pooling, pool, read_head
from edgetune.sentence_modules import read_prompting

_BATCH_TOKENS = 256
"""Measured best on two CPU cores with texts of 5 to 250 tokens."""
_MOST_SEQUENCES = 64
_LONGEST_DECODER_TEXT = 8192
"""A decoder's context is often far longer than memory for one evaluation of it."""


class LlamaBackend:
    """A GGUF model and a context that grows with the longest text; see `encoder.Backend`."""

    pads = False
    batch_tokens = _BATCH_TOKENS

    def __init__(
        self,
        model: Any,
        header: GgufHeader,
        profile: Profile,
        *,
        threads: int,
        flash_attn: FlashAttention,
        tap: Tap | None = None,
    ) -> None:
        """Take over `model`; use `open_llama_encoder`."""
        self._model, self._header, self._tap = model, header, tap
        self._threads, self._flash_attn = threads or physical_cores(), flash_attn
        self._context: Any = None
        self._batch = Batch(1)
        self._size = 0
        self._is_decoder = not profile.is_encoder
        self._width: int = lib.llama_model_n_embd_out(model)
        self._adapters = LoadedAdapters(model, header)
        self._adapter_key: AdapterKey = ()
        self._tables: _Tables | None = None
        self.profile = profile
        """What the model is for."""

    def set_adapters(self, adapters: Sequence[LoraSpec]) -> None:
        """Run under these adapters from now on. Raises `MismatchError`, `UnsupportedError`, `UsageError`."""
        self._adapter_key = self._adapters.load(adapters)
        self._tables = None

    def pool(self, batch: Sequence[Encoded], pooling: Pooling | None) -> Array:
        """Pooled last hidden states, (n, hidden); None is the model's own pooling."""
        return pool(self._states(batch), [len(one) for one in batch], pooling or self.profile.pooling)

    def score(self, batch: Sequence[Encoded]) -> Array:
        """What the head makes of the texts, (n, outputs)."""
        head = self.profile.head
        assert head is not None
        return head.apply(self.pool(batch, head.pooling or self.profile.pooling))

    def close(self) -> None:
        """Free the model."""
        if self._context is not None:
            lib.llama_free(self._context)
        if self._model is not None:
            lib.llama_model_free(self._model)
        self._context = self._model = None

    def _states(self, batch: Sequence[Encoded]) -> Array:
        """Hidden states of the batch's tokens, one text after the other."""
        if self._model is None:
            raise UsageError(f"{self.profile.path} was closed.", hint="Open it again.")
        total = sum(map(len, batch))
        self._make_room(total)
        self._adapters.apply(self._context, self._adapter_key)
        self._batch.clear()
        for number, one in enumerate(batch):
            self._batch.add(number, 0, one.ids, every_output=True)
        native.forget_errors()
        if any(one.types for one in batch) and (tables := self._type_tables()):
            with_types = tables.vectors(batch)
            code = lib.llama_encode(self._context, self._as_vectors(with_types))
        elif self._is_decoder:
            lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
            code = lib.llama_decode(self._context, self._batch.raw)
        else:
            # T5's encoder has a cache as well, and decoding would let its tokens see only those before them.
            code = lib.llama_encode(self._context, self._batch.raw)
        if code:
            raise native.failure("llama.cpp could not evaluate the texts")
        found = np.ctypeslib.as_array(lib.llama_get_embeddings(self._context), (total, self._width))
        return np.array(found, np.float32)

    def _as_vectors(self, vectors: Array) -> Any:
        raw = self._batch.raw
        return lib.llama_batch(
            n_tokens=raw.n_tokens,
            token=None,
            embd=vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=raw.pos,
            n_seq_id=raw.n_seq_id,
            seq_id=raw.seq_id,
            logits=raw.logits,
        )

    def _type_tables(self) -> _Tables | None:
        if self._is_decoder:
            return None
        if self._tables is None:
            self._tables = _Tables(self._header, self._adapter_key)
        return self._tables if self._tables.tells_types else None

    def _make_room(self, tokens: int) -> None:
        """Let the context take `tokens` at once: making a new one takes milliseconds, its size is memory."""
        if tokens <= self._size:
            return
        size = max(_BATCH_TOKENS, 1 << (tokens - 1).bit_length())
        if self._context is not None:
            lib.llama_free(self._context)
            self._context, self._size = None, 0
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = size
        parameters.n_seq_max, parameters.kv_unified = _MOST_SEQUENCES, True
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.embeddings, parameters.pooling_type = True, lib.LLAMA_POOLING_TYPE_NONE
        parameters.flash_attn_type = FLASH_ATTENTION[self._flash_attn]
        parameters.no_perf = True
        if self._tap is not None:
            parameters.cb_eval = self._tap.callback
        native.forget_errors()
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise native.failure(f"llama.cpp cannot make a context of {size} tokens for {self.profile.path}")
        self._adapters.applied = ()
        self._batch, self._size = Batch(size), size


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
    model = _load(path, header, gpu_layers=gpu_layers)
    tokenizer: EncoderTokenizer | None = None
    try:
        profile = _profile(header, head, is_encoder=_is_encoder(header))
        heads = {spec.path: read_head(spec.path) for spec in lora if spec.scale}
        check_heads(lora, lambda path: bool((found := heads[path]) and found.layers))
        for brought in heads.values():
            profile = with_adapter_head(profile, brought)
        backend = LlamaBackend(model, header, profile, threads=threads, flash_attn=flash_attn, tap=tap)
        backend.set_adapters(lora)
        tokenizer = _open_tokenizer(path, header)
    except BaseException:
        lib.llama_model_free(model)
        raise
    return Encoder(backend, tokenizer)


def _load(path: Path, header: GgufHeader, *, gpu_layers: int) -> Any:
    gpus = [device for device in list_devices() if device.kind in ("gpu", "igpu")]
    model = load_weights(path, header, gpu_layers=gpu_layers_for(header, gpu_layers, 0, gpus))
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
