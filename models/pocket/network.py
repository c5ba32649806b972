"""The network of pocket in plain torch: a Llama, written out so that training on a CPU wastes nothing.

Same mathematics and parameter names as transformers' LlamaForCausalLM (RMSNorm before each block, rotary positions in
the two-halves layout, grouped-query attention, SwiGLU, no biases, separate output head), so `state_dict()` saves as is.
It trains only; generation and everything else go through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; `hidden` and `inner` are multiples of 256 so that K-quants apply to every matrix."""

    vocabulary: int = 2560
    hidden: int = 256
    inner: int = 512
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    positions: int = 1024
    rope_theta: float = 10000.0
    epsilon: float = 1e-5


class Linear(nn.Linear):
    """A matrix without bias that is kept in f32 and used in the precision of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_size)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.o_proj = Linear(shape.heads * shape.head_size, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads, groups, size = self.shape.heads, self.shape.kv_heads, self.shape.head_size
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight]).to(x.dtype)
        qk = _rotate(F.linear(x, weight).view(batch, length, -1, size), cos, sin).transpose(1, 2)
        q, k = qk[:, :heads], qk[:, heads:]  # (batch, heads, length, size)
        v = self.v_proj(x).view(batch, length, -1, size).transpose(1, 2)
        # Written out: for short sequences this is four times as fast on a CPU as the fused kernel and its gradient.
        # The queries that share a key lie one after another.
        grouped = (q * size**-0.5).reshape(batch, groups, -1, size)
        scores = (grouped @ k.transpose(-1, -2)).view(batch, heads, length, length)
        chances = F.softmax(scores.masked_fill(future, float("-inf")), -1)
        y = (chances.view(batch, groups, -1, length) @ v).view(batch, heads, length, size)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.inner)
        self.up_proj = Linear(shape.hidden, shape.inner)
        self.down_proj = Linear(shape.inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One layer: attention, then feed-forward, each normed first and added back."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.epsilon)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, future)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embeddings, layers and the last norm: token ids (batch, length) → states (batch, length, hidden)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.epsilon)
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.outer(torch.arange(shape.positions), frequencies)
        cos, sin = angles.cos(), angles.sin()
        # (positions, 1, head size); the sign of the half turn is in the sine.
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", torch.cat([cos, cos], -1).bfloat16().unsqueeze(1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], -1).bfloat16().unsqueeze(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.embed_tokens(ids).bfloat16()
        for layer in self.layers:
            x = layer(x, cos, sin, future)
        out: Tensor = self.norm(x)
        return out


class Network(nn.Module):
    """`Body` and an output head of its own: an adapter on a shared (tied) head could not run in llama.cpp."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = Linear(shape.hidden, shape.vocabulary)
        self._initialize()

    def loss(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of next-token losses; `targets` and `weights` are (batch, length), weight 0 is not computed."""
        chosen = weights.flatten().nonzero().squeeze(1)
        states = self.model(ids).flatten(0, 1)[chosen]  # (chosen, hidden)
        losses = F.cross_entropy(self.lm_head(states).float(), targets.flatten()[chosen], reduction="none")
        return (losses * weights.flatten()[chosen]).sum()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            if "embed" in name:
                nn.init.normal_(parameter, std=0.5)
            elif "lm_head" in name or "o_proj" in name or "down_proj" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
