"""Small random T5-like checkpoints and SentencePiece unigram vocabularies, made in process; for tests only.

Scales are those of trained models: T5 does not scale attention, so its query matrices are small, and its embeddings are
large, or every distribution would be flat.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.engine import native

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "translate English to German: The house is wonderful. Das Haus ist wunderbar.",
    "summarize: a long text about nothing in particular, 12 345 67 890 times over.",
    "café naïve Straße œuvre Привет мир 東京 は 日本 の 首都 です",
    "question: what is 2 + 2? context: four is what it is, said the teacher (again!).",
] * 4

_TINY: dict[str, Any] = {"d_model": 64, "d_kv": 20, "d_ff": 96, "num_layers": 2, "num_heads": 3}
GATED = {"feed_forward_proj": "gated-gelu"}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", _TINY),
    "t5-unscaled": ("T5", {**_TINY, **GATED, "tie_word_embeddings": False}),
    "t5-uneven": ("T5", {**_TINY, "num_layers": 3, "num_decoder_layers": 1, "relative_attention_num_buckets": 24}),
    "flan-t5": ("T5", {**_TINY, **GATED, "d_model": 96, "tie_word_embeddings": False}),
    "mt5": ("MT5", {**_TINY, **GATED}),
    "umt5": ("UMT5", {**_TINY, **GATED}),
}
"""Name → (transformers' prefix, settings besides the vocabulary)."""
WITH_OWN_HEAD = ("flan-t5", "mt5")
"""Those whose head is a matrix of its own."""


@lru_cache
def sentencepiece_bytes(*, pad_first: bool = True) -> bytes:
    """A SentencePiece unigram model with T5's special pieces, or with XLM-RoBERTa's order (`pad_first` off)."""
    import sentencepiece

    ids: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if not pad_first:
        ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="unigram",
        vocab_size=220,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        character_coverage=1.0,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
        **ids,
    )
    return model.getvalue()


def write_unigram(directory: Path, model_type: str = "t5", *, vocab_size: int = 400) -> Path:
    """A directory with a unigram tokenizer as its SentencePiece file, and a config.json that says whose it is."""
    directory.mkdir(parents=True, exist_ok=True)
    is_t5 = model_type in ("t5", "mt5", "umt5")
    name = "spiece.model" if is_t5 else "sentencepiece.bpe.model"
    (directory / name).write_bytes(sentencepiece_bytes(pad_first=is_t5))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": vocab_size}))
    return directory


@lru_cache
def _tokenizer_json(tmp: str) -> tuple[str, str]:
    from transformers import AutoTokenizer

    source = write_unigram(Path(tmp) / "source")
    saved = Path(tmp) / "saved"
    AutoTokenizer.from_pretrained(source).save_pretrained(saved)
    return (saved / "tokenizer.json").read_text(), (saved / "tokenizer_config.json").read_text()


def write_t5(
    directory: Path,
    name: str = "t5",
    *,
    seed: int = 0,
    dtype: str = "float32",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random checkpoint of `name` (a key of `MODELS`) with a unigram tokenizer of about 300 pieces."""
    import torch
    import transformers

    prefix, settings = MODELS[name]
    vocabulary, config_text = _tokenizer_json(str(directory.parent))
    # Published T5 models have rows that no token uses.
    size = len(json.loads(vocabulary)["model"]["vocab"]) + 12
    config = getattr(transformers, f"{prefix}Config")(**{"vocab_size": size, **settings, **(overrides or {})})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    if name in WITH_OWN_HEAD:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    randomize_t5(model, seed=seed)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(vocabulary)
    (directory / "tokenizer_config.json").write_text(config_text)
    return directory


def randomize_t5(model: Any, *, seed: int = 0) -> None:
    """Give every parameter of a T5 the scale of a trained one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    width = config.d_model**0.5
    # A tied head that is any larger only ever repeats its input.
    scaled = getattr(config, "scale_decoder_outputs", config.model_type == "umt5")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "lm_head.weight":
                parameter.copy_(noise * 3 / width)
            elif "shared" in name or "embed_tokens" in name:
                own_head = model.lm_head.weight is not model.shared.weight
                parameter.copy_(noise * (2.0 if own_head else 5 / width if scaled else 5 / width**2))
            elif "relative_attention_bias" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                smaller = config.d_kv**-0.5 if name.endswith(".q.weight") else 1.0
                parameter.copy_(noise * parameter.shape[-1] ** -0.5 * smaller)
            else:
                parameter.copy_(1 + noise * 0.1)


def torch_seq2seq_logits(
    model_dir: Path, source: Sequence[int], target: Sequence[int], *, adapter_dir: Path | None = None
) -> NDArray[np.float32]:
    """(len(target), vocabulary) logits of the decoder in transformers, with PEFT's adapter if one is given."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    if adapter_dir is not None:
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(model, adapter_dir)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([list(source)]), decoder_input_ids=torch.tensor([list(target)]), use_cache=False
        ).logits
    return np.asarray(logits[0].float().numpy())


def llama_seq2seq_logits(
    path: Path, source: Sequence[int], target: Sequence[int], *, lora: Path | None = None
) -> NDArray[np.float32]:
    """The same of llama.cpp's encoder and decoder, straight from the bindings."""
    import ctypes

    import llama_cpp

    native.start()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = 1
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, settings)
    if lora is not None:
        adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp cannot load {lora}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
    try:
        for run, ids in ((llama_cpp.llama_encode, source), (llama_cpp.llama_decode, target)):
            batch = _batch(ids)
            if run(context, batch):
                raise RuntimeError("llama.cpp failed")
            llama_cpp.llama_batch_free(batch)
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = [llama_cpp.llama_get_logits_ith(context, position) for position in range(len(target))]
        return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def _batch(ids: Sequence[int]) -> Any:
    import llama_cpp

    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    return batch
