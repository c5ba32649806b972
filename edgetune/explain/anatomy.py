"""What a GGUF model is made of, from its header alone: blocks, weights, positions, head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from edgetune.explain.page import Anatomy, ModelKind, Part, Stack
from edgetune.explain.rope import read_rope
from edgetune.gguf_header import GgufHeader, TensorInfo, gguf_from_header, read_gguf_header
from edgetune.head import read_head
from edgetune.parameters import gguf_parameters

KINDS: dict[str, ModelKind] = {
    "bert": "encoder", "modern-bert": "encoder", "nomic-bert": "encoder", "neo-bert": "encoder", "t5encoder": "encoder",
    "t5": "encoder-decoder",
}  # fmt: skip
"""`general.architecture` → what it is; everything else is a decoder."""

ROLES = {
    "token_embd": "token embedding",
    "position_embd": "position embedding",
    "token_types": "segment embedding",
    "token_embd_norm": "norm of the embedding",
    "output_norm": "final norm",
    "output": "head: hidden → vocabulary",
    "rope_freqs": "rotary frequencies",
    "attn_norm": "norm before attention",
    "attn_q": "attention: queries",
    "attn_q_norm": "norm of queries",
    "attn_k": "attention: keys",
    "attn_k_norm": "norm of keys",
    "attn_v": "attention: values",
    "attn_qkv": "attention: queries, keys and values",
    "attn_rel_b": "attention: bias by distance",
    "attn_output": "attention: output",
    "attn_o": "attention: output",
    "attn_output_norm": "norm after attention",
    "post_attention_norm": "norm after attention",
    "cross_attn_norm": "norm before cross attention",
    "cross_attn_q": "cross attention: queries",
    "cross_attn_k": "cross attention: keys of the source",
    "cross_attn_v": "cross attention: values of the source",
    "cross_attn_o": "cross attention: output",
    "ffn_norm": "norm before the MLP",
    "ffn_gate_inp": "experts: router",
    "ffn_gate": "MLP: gate",
    "ffn_gate_exps": "experts: gates",
    "ffn_up": "MLP: up",
    "ffn_up_exps": "experts: up",
    "ffn_down": "MLP: down",
    "ffn_down_exps": "experts: down",
    "post_ffw_norm": "norm after the MLP",
    "layer_output_norm": "norm after the block",
}
"""GGUF name of a weight → what it does, in the order of computation."""

_ORDER = list(ROLES)

_BLOCK = re.compile(r"^(enc\.|dec\.)?blk\.(\d+)\.(.+)$")


def read_anatomy(path: Path, *, positions: int = 0, adapters: Sequence[Path] = ()) -> Anatomy:
    """The model in the GGUF file at `path`; `positions` is the prompt's length, `adapters` lie on its weights."""
    header = read_gguf_header(path)
    kind = KINDS.get(header.architecture, "decoder")
    ranks = _adapter_ranks(adapters)
    names = {"decoder": ["decoder"], "encoder": ["encoder"], "encoder-decoder": ["encoder", "decoder"]}[kind]
    stacks = tuple(_stack(header, name, kind, ranks, positions) for name in names)
    gguf = gguf_from_header(header)
    return Anatomy(
        name=str(header.metadata.get("general.name") or path.stem),
        path=path,
        architecture=header.architecture,
        kind=kind,
        parameters=gguf_parameters(header).total(),
        context=header.number("context_length") or 0,
        vocabulary=header.array_length("tokenizer.ggml.tokens") or header.number("vocab_size") or 0,
        file_type=gguf.file_type,
        stacks=(*stacks[:-1], replace(stacks[-1], head=(*stacks[-1].head, *_head_parts(header, adapters)))),
        tied=kind != "encoder" and all(tensor.name != "output.weight" for tensor in header.tensors),
    )


def _stack(header: GgufHeader, name: str, kind: ModelKind, ranks: dict[str, list[int]], positions: int) -> Stack:
    prefix = {"encoder-decoder": f"{name[:3]}."}.get(kind, "")
    blocks: dict[int, list[Part]] = {}
    before: list[Part] = []
    after: list[Part] = []
    for tensor in header.tensors:
        found = _BLOCK.match(tensor.name)
        if found:
            if (found[1] or "") == prefix:
                blocks.setdefault(int(found[2]), []).append(_part(tensor, found[3], ranks))
        elif tensor.name.split(".")[-2].endswith(("output", "output_norm")) or tensor.name.startswith("cls"):
            if (prefix and tensor.name.startswith(prefix)) or (not tensor.name.startswith(("enc.", "dec."))):
                after.append(_part(tensor, tensor.name.removeprefix(prefix), ranks))
        else:
            before.append(_part(tensor, tensor.name, ranks))
    heads = header.number("attention.head_count") or 1
    hidden = header.number("embedding_length") or 0
    head_size = header.number("attention.key_length") or hidden // heads
    here = {part.name.split(".")[0] for part in before} | {p.name.split(".")[0] for ps in blocks.values() for p in ps}
    rotates = not here & {"position_embd", "attn_rel_b"}
    rope = read_rope(header, head_size, positions=positions) if rotates else None
    return Stack(
        name=name,
        layers=len(blocks),
        hidden_size=hidden,
        heads=heads,
        kv_heads=header.number("attention.head_count_kv") or heads,
        head_size=head_size,
        positions="learned" if "position_embd" in here else "relative" if "attn_rel_b" in here else "rotary",
        embedding=tuple(sorted(before, key=_place)),
        blocks=tuple(tuple(sorted(_with_gate(blocks[index]), key=_place)) for index in sorted(blocks)),
        head=tuple(sorted(after, key=_place)) if not (kind == "encoder-decoder" and name == "encoder") else (),
        rope=rope,
        window=header.number("attention.sliding_window") or 0,
    )


def _head_parts(header: GgufHeader, adapters: Sequence[Path]) -> list[Part]:
    """The layers of a head that travels as metadata; an adapter's takes the place of its base's."""
    sources: list[Path | GgufHeader] = [*reversed(adapters), header]
    heads = [head for source in sources if (head := read_head(source)) and head.layers]
    if not heads:
        return []
    return [
        Part(
            name=f"head.{number}",
            role=("head: norm" if layer.kind == "layer_norm" else "head")
            + (f", then {layer.activation}" if layer.activation != "none" else ""),
            shape=tuple(layer.weight.shape),
            type="F32",
            parameters=int(layer.weight.size),
        )
        for number, layer in enumerate(heads[0].layers)
    ]


def _with_gate(parts: list[Part]) -> list[Part]:
    """A block's `parts`, where an MLP's first matrix that gives twice the width is known as gate and up in one."""
    shapes = {part.name: part.shape for part in parts}
    up, down = (shapes.get(f"ffn_{name}.weight", ()) for name in ("up", "down"))
    if not (up and down and up[0] == 2 * down[1]):
        return parts
    return [replace(part, role="MLP: gate and up") if part.name == "ffn_up.weight" else part for part in parts]


def _place(part: Part) -> tuple[int, bool]:
    """Where a weight stands in the order of computation, its bias behind it."""
    name = part.name.split(".")[0]
    return _ORDER.index(name) if name in _ORDER else len(_ORDER), part.name.endswith("bias")


def _part(tensor: TensorInfo, name: str, ranks: dict[str, list[int]]) -> Part:
    base, _, ending = name.rpartition(".")
    role = ROLES.get(base, base.replace("_", " "))
    return Part(
        name=name,
        role=f"{role} (bias)" if ending == "bias" else role,
        shape=tuple(reversed(tensor.shape)),
        type=tensor.type,
        parameters=prod(tensor.shape),
        adapted=tuple(ranks.get(tensor.name, ())),
    )


def _adapter_ranks(adapters: Sequence[Path]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for path in adapters:
        for tensor in read_gguf_header(path).tensors:
            if tensor.name.endswith(".lora_a"):
                ranks.setdefault(tensor.name.removesuffix(".lora_a"), []).append(tensor.shape[-1])
    return ranks
