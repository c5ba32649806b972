"""T5 and what shares its graph: T5 v1.0 (ReLU), v1.1 and Flan-T5 (gated GELU), mT5, UMT5; and T5's encoder by itself.

transformers multiplies the decoder's output by d_model^-0.5 before the head of some of them; llama.cpp's graph does
not, so the factor is folded into the decoder's last norm, which stays float32. Attention is not scaled, and positions
are told apart in buckets of distances, for which llama.cpp has one largest distance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from converters.base import EMBEDDING, HEAD, Family, Weight, weight
from converters.errors import UnsupportedAdapter, UnsupportedModel
from converters.families.gemma2 import TANH_GELU
from converters.head import Head
from converters.operations import Scale
from converters.writer import Value

_LARGEST_DISTANCE = 128
_BUCKETS = range(4, 256)
"""Numbers of buckets that llama.cpp's formula and transformers' agree on at every distance."""
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Other names of the one token embedding."""


class T5(Family):
    """`T5ForConditionalGeneration`, in every published form."""

    architectures: ClassVar[tuple[str, ...]] = ("T5ForConditionalGeneration", "T5WithLMHeadModel")
    gguf_architecture = "t5"
    defaults: ClassVar[Mapping[str, Any]] = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": _LARGEST_DISTANCE,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "n_positions": 512,
        "pad_token_id": 0,
    }
    # The second was trained in the first checkpoints, and is used by nobody.
    ignored = r".*\.EncDecAttention\.relative_attention_bias\.weight"
    embedding_name = "shared.weight"
    # The activations before these matrices leave float16's range in trained models; transformers keeps them wide, too.
    not_float16: ClassVar[str] = r"(enc|dec)\.blk\.\d+\.ffn_down\.weight"
    carries_tokenizer = True
    bias_layers: ClassVar[slice] = slice(0, 1)
    """The layers of a stack that have a table of distances; the others use the first one's."""
    scales_output: ClassVar[bool | None] = None
    """Whether the decoder's output is scaled; None: as config.json says."""

    @property
    def head(self) -> Head | None:
        return Head("seq2seq")

    @property
    def hidden(self) -> int:
        return self.config.natural("d_model")

    @property
    def layers(self) -> int:
        return self.config.natural("num_layers")

    @property
    def decoder_layers(self) -> int:
        return self.config.natural("num_decoder_layers") if self.config.get("num_decoder_layers") else self.layers

    @property
    def tied(self) -> bool:
        # transformers ties them always; a checkpoint with a head of its own keeps that.
        return True

    @property
    def is_gated(self) -> bool:
        spelled = str(self.config["feed_forward_proj"]).startswith("gated-")
        return bool(self.config.get("is_gated_act", spelled))

    @property
    def output_scale(self) -> float:
        """What transformers multiplies the decoder's output with, before the head."""
        scales = self.scales_output
        if scales is None:
            scales = bool(self.config.get("scale_decoder_outputs", self.config.get("tie_word_embeddings") is not False))
        return self.hidden**-0.5 if scales else 1.0

    @property
    def decoder_start(self) -> int:
        """The token that a decoder's input begins with; configs that leave it out mean the padding token."""
        value = self.config.get("decoder_start_token_id", self.config.get("pad_token_id", 0))
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0

    def check(self) -> None:
        if self.config.get("tokenizer_class") == "ByT5Tokenizer":
            raise UnsupportedModel(
                "The model reads bytes (ByT5), for which llama.cpp has no vocabulary.",
                hint="Run it with torch: --engine torch.",
            )
        self.config.require("relative_attention_max_distance", _LARGEST_DISTANCE)
        if (buckets := self.config.natural("relative_attention_num_buckets")) not in _BUCKETS:
            raise UnsupportedModel(
                f"config.json sets relative_attention_num_buckets to {buckets}; llama.cpp can tell "
                f"{_BUCKETS.start} to {_BUCKETS.stop - 1} buckets apart as the model does."
            )
        self._check_activation()
        self._check_layers()

    def _check_activation(self) -> None:
        name = str(self.config["feed_forward_proj"])
        activation = "gelu_new" if name == "gated-gelu" else name.rpartition("-")[2]
        activation = str(self.config.get("dense_act_fn", activation))
        if activation not in (TANH_GELU if self.is_gated else ("relu",)):
            raise UnsupportedModel(
                f"config.json sets feed_forward_proj to {name!r} (activation {activation!r}, "
                f"{'' if self.is_gated else 'not '}gated); llama.cpp's graph computes 'relu' and 'gated-gelu' alone.",
                hint="A file made from it would answer differently from the model, so none is made.",
            )

    def _check_layers(self) -> None:
        if self.decoder_layers > self.layers:
            raise UnsupportedModel(
                f"The decoder has {self.decoder_layers} layers, the encoder {self.layers}; llama.cpp's graph needs an "
                "encoder of at least as many."
            )

    def metadata(self) -> dict[str, Value]:
        return {
            **self.stack_metadata(),
            "decoder_block_count": self.decoder_layers,
            "decoder_start_token_id": self.decoder_start,
        }

    def other_metadata(self) -> dict[str, Value]:
        tasks = self.config.get("task_specific_params")
        found = {name: one.get("prefix") for name, one in (tasks or {}).items() if isinstance(one, dict)}
        return {f"edgetune.prompts.{name}": text for name, text in found.items() if isinstance(text, str) and text}

    def stack_metadata(self) -> dict[str, Value]:
        """The keys that an encoder alone has as well."""
        epsilon = self.config.number("layer_norm_epsilon")
        return {
            "block_count": self.layers,
            "context_length": self.config.natural("n_positions"),
            "embedding_length": self.hidden,
            "feed_forward_length": self.config.natural("d_ff"),
            "attention.head_count": self.config.natural("num_heads"),
            "attention.key_length": self.config.natural("d_kv"),
            "attention.value_length": self.config.natural("d_kv"),
            "attention.layer_norm_epsilon": epsilon,
            "attention.layer_norm_rms_epsilon": epsilon,
            "attention.relative_buckets_count": self.config.natural("relative_attention_num_buckets"),
            "vocab_size": self.config.natural("vocab_size"),
        }

    def canonical(self, name: str) -> str:
        return self.embedding_name if name in _COPIES else name

    def may_repeat(self, name: str) -> bool:
        return name in (*_COPIES, self.embedding_name)

    def check_adapted(self, name: str) -> None:
        if name == self.embedding_name:
            raise UnsupportedAdapter(
                "The adapter changes the token embedding, of which encoder and decoder have a copy each in PEFT and "
                "share one in the GGUF file.",
                hint="Train without 'shared' and 'embed_tokens' among target_modules and modules_to_save.",
            )

    def weights(self) -> Iterator[Weight]:
        vocabulary = self.config.natural("vocab_size")
        yield weight(self.embedding_name, (vocabulary, self.hidden), EMBEDDING)
        yield from self.stack_weights("encoder", "enc", self.layers)
        yield from self.stack_weights("decoder", "dec", self.decoder_layers, scale=self.output_scale)
        yield weight(self.head_name, (vocabulary, self.hidden), HEAD)

    def stack_weights(self, here: str, there: str, layers: int, *, scale: float = 1.0) -> Iterator[Weight]:
        """The weights of the encoder or the decoder, whose last norm is multiplied by `scale`."""
        scaling = (Scale(scale),) if scale != 1.0 else ()
        yield weight(f"{here}.final_layer_norm.weight", (self.hidden,), f"{there}.output_norm.weight", *scaling)
        with_bias = range(layers)[self.bias_layers]
        for layer in range(layers):
            block, target = f"{here}.block.{layer}.layer", f"{there}.blk.{layer}"
            yield from self._attention(f"{block}.0", "SelfAttention", f"{target}.attn")
            if layer in with_bias:
                shape = (self.config.natural("relative_attention_num_buckets"), self.config.natural("num_heads"))
                name = f"{block}.0.SelfAttention.relative_attention_bias.weight"
                yield weight(name, shape, f"{target}.attn_rel_b.weight")
            if there == "dec":
                yield from self._attention(f"{block}.1", "EncDecAttention", f"{target}.cross_attn")
            yield from self._feed_forward(f"{block}.{2 if there == 'dec' else 1}", target)

    def _attention(self, here: str, kind: str, there: str) -> Iterator[Weight]:
        inner = self.config.natural("num_heads") * self.config.natural("d_kv")
        yield weight(f"{here}.layer_norm.weight", (self.hidden,), f"{there}_norm.weight")
        for projection in "qkv":
            yield weight(f"{here}.{kind}.{projection}.weight", (inner, self.hidden), f"{there}_{projection}.weight")
        yield weight(f"{here}.{kind}.o.weight", (self.hidden, inner), f"{there}_o.weight")

    def _feed_forward(self, here: str, there: str) -> Iterator[Weight]:
        inner = self.config.natural("d_ff")
        yield weight(f"{here}.layer_norm.weight", (self.hidden,), f"{there}.ffn_norm.weight")
        entering = {"wi_0": "gate", "wi_1": "up"} if self.is_gated else {"wi": "up"}
        for projection, target in entering.items():
            name = f"{here}.DenseReluDense.{projection}.weight"
            yield weight(name, (inner, self.hidden), f"{there}.ffn_{target}.weight")
        yield weight(f"{here}.DenseReluDense.wo.weight", (self.hidden, inner), f"{there}.ffn_down.weight")


class MT5(T5):
    """`MT5ForConditionalGeneration`: T5 v1.1 with a large vocabulary."""

    architectures = ("MT5ForConditionalGeneration",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **T5.defaults,
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }
    scales_output = False


class UMT5(MT5):
    """`UMT5ForConditionalGeneration`: every layer has a table of distances of its own."""

    architectures = ("UMT5ForConditionalGeneration",)
    bias_layers = slice(None)
    scales_output = True


class T5Encoder(T5):
    """`T5EncoderModel`: the encoder by itself, for embeddings."""

    architectures: ClassVar[tuple[str, ...]] = ("T5EncoderModel", "MT5EncoderModel")
    gguf_architecture = "t5encoder"
    writes_text = False

    @property
    def head(self) -> Head | None:
        return Head("embedding")

    def _check_layers(self) -> None:
        """There is no decoder."""

    def metadata(self) -> dict[str, Value]:
        return self.stack_metadata()

    def other_metadata(self) -> dict[str, Value]:
        return {}

    def weights(self) -> Iterator[Weight]:
        yield weight(self.embedding_name, (self.config.natural("vocab_size"), self.hidden), EMBEDDING)
        yield from self.stack_weights("encoder", "enc", self.layers)

    def is_left_out(self, name: str) -> bool:
        # A sentence model's checkpoint may hold the decoder it was trained without.
        return re.match(r"decoder\.|lm_head\.", self.canonical(name)) is not None


class UMT5Encoder(T5Encoder):
    """`UMT5EncoderModel`."""

    architectures = ("UMT5EncoderModel",)
    bias_layers = slice(None)
