"""Small encoders with tokenizers of their kind, and what llama.cpp and a GGUF file's head make of token ids."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import randomize
from tests.llama_logits import load_model

LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
_SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "max_position_embeddings": 160,
}
_ROBERTA = {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "wordpiece", _SIZES),
    "bert-odd": ("Bert", "wordpiece", {**_SIZES, "hidden_size": 104, "num_attention_heads": 8, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        "wordpiece",
        {"dim": 96, "n_layers": 3, "n_heads": 4, "hidden_dim": 160, "max_position_embeddings": 160},
    ),
    "electra": ("Electra", "wordpiece", {**_SIZES, "embedding_size": 96}),
    "roberta": ("Roberta", "bytes", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", "unigram", _ROBERTA),
    "camembert": ("Camembert", "unigram", _ROBERTA),
    "modernbert": (
        "ModernBert",
        "bytes",
        {
            **{key: value for key, value in _ROBERTA.items() if key != "type_vocab_size"},
            "num_hidden_layers": 5,
            "local_attention": 16,
            "cls_token_id": 0,
            "sep_token_id": 2,
        },
    ),
}
"""Name → (what transformers' class names begin with, kind of tokenizer, settings besides the vocabulary)."""


def write_encoder(
    directory: Path, name: str, kind: str = "Model", *, seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> Path:
    """Save a random `…{kind}` of `name` (a key of `ENCODERS`) with its tokenizer."""
    import torch
    import transformers

    stem, tokenizer_kind, settings = ENCODERS[name]
    size = write_tokenizer(directory, tokenizer_kind, stem)
    config = getattr(transformers, f"{stem}Config")(vocab_size=size, **{**settings, **(overrides or {})})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}{kind}")(config)
    randomize(model, seed=seed)
    model.save_pretrained(directory)
    return directory


def write_tokenizer(directory: Path, kind: str, stem: str) -> int:
    """Save a tokenizer of `kind` ("wordpiece", "bytes", "unigram") and return how many entries it has."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "wordpiece":
        vocabulary = wordpiece_vocabulary()
        (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        return len(vocabulary)
    import transformers

    if kind == "bytes":
        values = json.loads(_bytes_json())["model"]
        merges = [tuple(pair) for pair in values["merges"]]
        tokenizer = transformers.RobertaTokenizer(vocab=values["vocab"], merges=merges)
    else:
        pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        words = ("▁the", "▁a", "▁quick", "▁brown", "▁fox", "s", "ing", "▁", "é", "中", *"abcdefghijklmnopqrstuvwxyz.,")
        pieces += [(word, -1.0 - 0.1 * number) for number, word in enumerate(words)]
        tokenizer = transformers.XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)])
    tokenizer.save_pretrained(directory)
    if stem == "ModernBert":
        # Its tokenizer is taken as tokenizer.json has it.
        edit = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(
            json.dumps({**edit, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
    return len(tokenizer)


def wordpiece_vocabulary() -> list[str]:
    """Lines of a vocab.txt: special tokens, words, letters in both cases, and their continuations."""
    letters = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789éÉüß中漢字.,!?'-$@#"]
    words = ["the", "The", "quick", "brown", "fox", "cafe", "café", "play", "hello", "unused"]
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*special, *words, *letters, *(f"##{letter}" for letter in letters), "##ing", "##ed"]


@lru_cache
def _bytes_json() -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, don't you think?"] * 9, trainer)
    return str(tokenizer.to_str())


def llama_states(path: Path, ids: Sequence[int], *, lora: Path | None = None) -> NDArray[np.float32]:
    """(len(ids), hidden) last hidden states of the GGUF file in llama.cpp, with the adapter `lora` if given."""
    import llama_cpp

    with load_model(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_threads = params.n_threads_batch = 1
        params.embeddings = True
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode()) if lora else None
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            if lora:
                adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
                llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            size = llama_cpp.llama_model_n_embd(model)
            rows = [
                np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_ith(context, position), (size,)).copy()
                for position in range(len(ids))
            ]
            return np.stack(rows)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)


def head_output(path: Path, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the head in the GGUF file at `path` makes of a text's hidden states."""
    from edgetune.head import pool, read_head

    head = read_head(path)
    assert head is not None
    assert head.pooling is not None
    return np.asarray(head.apply(pool(states, [len(states)], head.pooling))[0])


def softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities."""
    shifted = np.exp(values - values.max())
    return np.asarray(shifted / shifted.sum())


def furthest(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """The largest 1 − cosine over rows."""
    products = (expected * found).sum(axis=-1)
    return float(np.max(1 - products / np.linalg.norm(expected, axis=-1) / np.linalg.norm(found, axis=-1)))
