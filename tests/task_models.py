"""Small random-weight models for the tasks beside chat, saved by transformers, with tokenizers trained in process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

WORDS = (
    *("red", "blue", "green", "apple", "pear", "plum", "house", "tree", "river", "one", "two", "three", "four", "cat"),
    *("dog", "runs", "sleeps", "quick", "slow", "very", "not", "the", "a", "is", "rot", "blau", "haus", "baum", "hund"),
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789<>[]/"
_CONTROL = ("pad", "bos", "eos", "cls", "sep")
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZES),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "roberta": ("RobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaConfig", {**_SIZES, "type_vocab_size": 1}),
    "modernbert": ("ModernBertConfig", {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 16}),
    "llama": ("LlamaConfig", {**_SIZES, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**_SIZES, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
_BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "bart": ("BartConfig", _BART),
    "mbart": ("MBartConfig", _BART),
    "bert2bert": ("EncoderDecoderConfig", {}),
}
LANGUAGES = ("en_XX", "de_DE", "fr_XX")


@lru_cache
def _tokenizer_json(specials: tuple[str, ...], around: str) -> str:
    """Whole words of `WORDS`, single letters for others; `around` is what stands around a text, "$A" for it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=specials[0]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 30, trainer)
    if around:
        after = around.partition("$A")[2]
        pair = f"{around} $B:1{''.join(f' {name}:1' for name in after.split())}"
        ids = [(name, tokenizer.token_to_id(name)) for name in specials if name in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, pair=pair, special_tokens=ids)
    return str(tokenizer.to_str())


def build_tokenizer(family: str) -> Any:
    """A fast tokenizer with the control tokens that the family has."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    extra: tuple[str, ...] = ()
    if family in ("bert", "distilbert", "modernbert", "bert2bert"):
        names = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        around = "[CLS] $A [SEP]"
    elif family in ("roberta", "xlm-roberta", "bart"):
        names = {"unk": "<unk>", "bos": "<s>", "pad": "<pad>", "eos": "</s>", "cls": "<s>", "sep": "</s>"}
        around = "<s> $A </s>"
    elif family == "mbart":
        names = {"unk": "<unk>", "bos": "<s>", "pad": "<pad>", "eos": "</s>"}
        around, extra = "$A </s> en_XX", LANGUAGES
    elif family == "t5":
        names, around = {"unk": "<unk>", "pad": "<pad>", "eos": "</s>"}, "$A </s>"
    else:
        names, around = {"unk": "<unk>", "eos": "<|end|>"}, ""
    specials = tuple(dict.fromkeys((*names.values(), *extra)))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(specials, around)),
        additional_special_tokens=list(extra) or None,
        **{f"{name}_token": text for name, text in names.items()},
    )


def write_model(
    directory: Path, family: str, *, head: str = "", seed: int = 0, overrides: Mapping[str, Any] | None = None
) -> Path:
    """Save a random model. `head` is the transformers class to save it as, by default the family's bare one."""
    import torch
    import transformers

    tokenizer = build_tokenizer(family)
    class_name, sizes = {**ENCODERS, **SEQ2SEQ}[family]
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")
    }
    ids = {name: value for name, value in ids.items() if value is not None}
    torch.manual_seed(seed)
    if family == "bert2bert":
        halves = [
            transformers.BertConfig(vocab_size=len(tokenizer), **{**_SIZES, "num_hidden_layers": 1}, **ids)
            for _ in range(2)
        ]
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
        config.decoder_start_token_id, config.pad_token_id = ids["cls_token_id"], ids["pad_token_id"]
        model = transformers.EncoderDecoderModel(config)
    else:
        config = getattr(transformers, class_name)(vocab_size=len(tokenizer), **{**ids, **sizes, **(overrides or {})})
        if family in ("bart", "mbart"):
            config.decoder_start_token_id = ids["eos_token_id"]
        auto = "AutoModelForSeq2SeqLM" if family in SEQ2SEQ else "AutoModel"
        cls = getattr(transformers, head) if head else None
        model = cls(config) if cls else getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.5 if "embed" in name or "shared" in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape) * scale)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(directory: Path, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """A data directory with a JSONL file for each split."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return directory
