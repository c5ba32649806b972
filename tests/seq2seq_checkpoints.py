"""Small random encoder-decoders as transformers saves them, at the scale of trained weights, with their tokenizers.

Their end token is likelier than chance makes it, so that texts end by themselves as well as at the limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

_WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards mix potions near an old bridge and sing about rain "
    "summer bread trains stars rivers children books music garden winter stone silver horses dancing slowly together"
)
TEXTS = [
    f"{first} {second} {third}"
    for first in ("the quick fox", "seven wizards", "old trains", "rain and bread", "a silver horse")
    for second in ("jumps over", "sing about", "mix", "near the", "dancing with")
    for third in ("a lazy dog", "stars and rivers slowly")
]
"""50 sources."""


def write_seq2seq(directory: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Save a checkpoint of `family`: t5, flan-t5, bart, mbart, mbart50, bert2bert or one of `OTHERS`."""
    import torch

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = _FAMILIES[family](**changes) if family in _FAMILIES else _other(family, **changes)
        _randomize(model, seed=seed)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def _t5(**changes: Any) -> tuple[Any, Any]:
    import transformers

    tokenizer = unigram_tokenizer("t5")
    config = transformers.T5Config(
        **{
            "vocab_size": len(tokenizer),
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            **changes,
        }
    )
    return transformers.T5ForConditionalGeneration(config), tokenizer


def _flan_t5(**changes: Any) -> tuple[Any, Any]:
    return _t5(**{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, **changes})


def _bart(**changes: Any) -> tuple[Any, Any]:
    import transformers

    from tests.checkpoints import build_bpe_tokenizer

    tokenizer = build_bpe_tokenizer(chat_template=None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sizes = _bart_sizes(len(tokenizer), start=end, end=end, pad=tokenizer.pad_token_id)
    config = transformers.BartConfig(
        **{**sizes, "forced_eos_token_id": end, "bos_token_id": end, "tie_word_embeddings": False, **changes}
    )
    return transformers.BartForConditionalGeneration(config), tokenizer


def _mbart(**changes: Any) -> tuple[Any, Any]:
    import transformers

    tokenizer = unigram_tokenizer("mbart")
    sizes = _bart_sizes(len(tokenizer), start=tokenizer.convert_tokens_to_ids("ro_RO"), end=2, pad=1)
    config = transformers.MBartConfig(**{**sizes, "bos_token_id": 0, "forced_eos_token_id": 2, **changes})
    return transformers.MBartForConditionalGeneration(config), tokenizer


def _mbart50(**changes: Any) -> tuple[Any, Any]:
    import transformers

    tokenizer = unigram_tokenizer("mbart50")
    sizes = _bart_sizes(len(tokenizer), start=2, end=2, pad=1)
    config = transformers.MBartConfig(**{**sizes, "bos_token_id": 0, "forced_eos_token_id": 2, **changes})
    return transformers.MBartForConditionalGeneration(config), tokenizer


def _bart_sizes(vocabulary: int, *, start: int, end: int, pad: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 128,
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def _bert2bert(**changes: Any) -> tuple[Any, Any]:
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = [
        *_WORDS.split(),
        *"abcdefghijklmnopqrstuvwxyz",
        *("##" + letter for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys([*special, *words]))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=backend)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
    }
    encoder, decoder = transformers.BertConfig(**sizes), transformers.BertConfig(**sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = transformers.EncoderDecoderModel(config=config)
    model.config.decoder_start_token_id, model.config.pad_token_id, model.config.eos_token_id = 2, 0, 3
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    return model, tokenizer


_T5_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_PROPHET_SIZES = {
    "hidden_size": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "num_buckets": 16,
    "relative_max_distance": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "m2m100": ("M2M100ForConditionalGeneration", "mbart50", {}),
    "pegasus": ("PegasusForConditionalGeneration", "t5", {"scale_embedding": True}),
    "pegasus-x": ("PegasusXForConditionalGeneration", "t5", {"num_global_tokens": 8, "block_size": 16}),
    "marian": ("MarianMTModel", "t5", {"bad_words_ids": [[0]]}),
    "plbart": ("PLBartForConditionalGeneration", "mbart", {}),
    "led": (
        "LEDForConditionalGeneration",
        "t5",
        {"attention_window": 16, "max_encoder_position_embeddings": 256, "max_decoder_position_embeddings": 128},
    ),
    "longt5": ("LongT5ForConditionalGeneration", "t5", {**_T5_SIZES, "local_radius": 7}),
    "longt5-global": (
        "LongT5ForConditionalGeneration",
        "t5",
        {**_T5_SIZES, "local_radius": 7, "global_block_size": 4, "encoder_attention_type": "transient-global"},
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "t5",
        {**_T5_SIZES, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "prophetnet": ("ProphetNetForConditionalGeneration", "t5", _PROPHET_SIZES),
}
"""Families that run in torch alone: (class, tokenizer, settings)."""


def _other(family: str, **changes: Any) -> tuple[Any, Any]:
    import transformers

    class_name, kind, settings = OTHERS[family]
    tokenizer, model_class = unigram_tokenizer(kind), getattr(transformers, class_name)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    sizes = (
        {}
        if "d_kv" in settings or "num_buckets" in settings
        else _bart_sizes(len(tokenizer), start=end, end=end, pad=pad)
    )
    sizes.pop("max_position_embeddings" if family == "led" else "", None)
    config = model_class.config_class(**{"vocab_size": len(tokenizer), **sizes, **settings, **changes})
    return model_class(config), tokenizer


def unigram_tokenizer(kind: str) -> Any:
    """SentencePiece as in T5 (text, </s>), mBART (text, </s>, code) or mBART-50 (code, text, </s>)."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_unigram_json(kind))
    end = backend.token_to_id("</s>")
    english = backend.token_to_id("en_XX")
    if kind == "t5":
        template, special = "$A </s>", [("</s>", end)]
    else:
        template = "$A </s> en_XX" if kind == "mbart" else "en_XX $A </s>"
        special = [("</s>", end), ("en_XX", english)]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    languages = [] if kind == "t5" else list(_LANGUAGES)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>"] if kind == "t5" else languages,
    )


_LANGUAGES = ("en_XX", "de_DE", "ro_RO", "pt_XX")


@lru_cache
def _unigram_json(kind: str) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"] if kind == "t5" else ["<s>", "<pad>", "</s>", "<unk>"]
    words = ["\u2581" + word for word in dict.fromkeys(_WORDS.split())]
    parts = [word[1:4] for word in words] + [word[:4] for word in words]
    letters = "\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?<>/_-()"
    pieces = [(piece, -2.0 - place / 50) for place, piece in enumerate(dict.fromkeys([*words, *parts, *letters]))]
    languages = [] if kind == "t5" else list(_LANGUAGES)
    vocabulary = [(text, 0.0) for text in [*special, *languages]] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, *languages])
    return str(tokenizer.to_str())


def _randomize(model: Any, *, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    is_t5 = type(model).__name__.startswith("T5")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "shared" in name or "embed" in name:
                parameter.copy_(noise * (1.0 if is_t5 else 0.25))
            elif "relative_attention_bias" in name:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim >= 2:
                # T5 does not scale its attention; trained queries are the smaller for it.
                scale = parameter.shape[-1] ** -0.5 if name.endswith(".q.weight") and is_t5 else 3.0
                # What is said has to depend on the source.
                scale *= 4 if "encoder_attn.out_proj" in name or "crossattention.output.dense" in name else 1
                parameter.copy_(noise * scale * parameter.shape[-1] ** -0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + noise * 0.1)
            else:
                parameter.copy_(noise * 0.1)
        _favour_the_end(model)


def _favour_the_end(model: Any) -> None:
    head, end = model.get_output_embeddings(), model.generation_config.eos_token_id
    if type(model).__name__.startswith("T5"):
        head.weight[end] *= 2
    if getattr(head, "bias", None) is not None:
        head.bias[end] += 2
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias[0, end] += 8


_FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "t5": _t5,
    "flan-t5": _flan_t5,
    "bart": _bart,
    "mbart": _mbart,
    "mbart50": _mbart50,
    "bert2bert": _bert2bert,
}
