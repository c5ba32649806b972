"""Logits and token ids straight from llama.cpp's bindings, and the distance of two sets of logits; for tests only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native


@contextmanager
def load_model(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    """A model of llama.cpp's bindings, freed at the end."""
    import llama_cpp

    native.start()  # silences the log for good: a callback of our own would be called after it is gone
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def llama_logits(path: Path, ids: Sequence[int], *, n_ctx: int = 512) -> NDArray[np.float32]:
    """(len(ids), vocabulary) logits of the GGUF file at every position, in a context of `n_ctx` tokens, on the CPU."""
    import llama_cpp

    with load_model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, position), (size,)).copy()
                for position in range(len(ids))
            ]
            return np.stack(rows)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def llama_tokenize(
    path: Path, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = False
) -> list[list[int]]:
    """Token ids of each text by the GGUF file's own vocabulary."""
    import llama_cpp

    with load_model(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text, add_special, parse_special) for text in texts]


def _tokenize(vocab: Any, text: str, add_special: bool, parse_special: bool) -> list[int]:
    import llama_cpp

    data = text.encode()
    ids = (llama_cpp.llama_token * (len(data) + 16))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), add_special, parse_special)
    return list(ids[:count])


def torch_logits(model_dir: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """(len(ids), vocabulary) logits of the checkpoint in transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(ids)])).logits[0].float().numpy())


def max_kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest Kullback-Leibler divergence of two sets of logits over the positions."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
