"""What a transformers model is made of: its stacks of blocks, found in its modules, and their weights' roles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.explain.checkpoint_order import Order, place, with_norms
from edgetune.explain.page import Anatomy, ModelKind, Part, Rope, Stack
from edgetune.explain.rope import build_rope
from edgetune.fingerprint import read_safetensors_header, safetensors_files
from edgetune.parameters import checkpoint_parameters
from edgetune.text_limit import positions as text_positions

_ROLES = (
    (r"bottleneck.*\bdown\b", "adapter: down"),
    (r"bottleneck.*\bup\b", "adapter: up"),
    (r"(position_embeddings|embed_positions|\bwpe\b)", "position embedding"),
    (r"token_type_embeddings", "segment embedding"),
    (r"(word_embeddings|embed_tokens|tok_embeddings|\bwte\b|\bshared\b)", "token embedding"),
    (r"(lm_head|classifier|\bscore\b|pooler|pre_classifier|^cls\.)(?!.*(norm|Norm))", "head"),
    (r"(EncDecAttention|encoder_attn|crossattention).*?(q_proj|\bq\b|query)", "cross attention: queries"),
    (r"(EncDecAttention|encoder_attn|crossattention).*?(k_proj|\bk\b|key)", "cross attention: keys of the source"),
    (r"(EncDecAttention|encoder_attn|crossattention).*?(v_proj|\bv\b|value)", "cross attention: values of the source"),
    (r"(EncDecAttention|encoder_attn|crossattention).*?(norm|LayerNorm)", "norm of cross attention"),
    (r"(EncDecAttention|encoder_attn|crossattention)", "cross attention: output"),
    (r"relative_attention_bias", "attention: bias by distance"),
    (r"q_norm", "norm of queries"),
    (r"k_norm", "norm of keys"),
    (r"(qkv_proj|c_attn|Wqkv|query_key_value)", "attention: queries, keys and values"),
    (r"(q_proj|q_lin|\bq\b|\bquery\b)", "attention: queries"),
    (r"(k_proj|k_lin|\bk\b|\bkey\b)", "attention: keys"),
    (r"(v_proj|v_lin|\bv\b|\bvalue\b)", "attention: values"),
    (r"(norm|LayerNorm|layer_norm|\bln_)", "norm"),
    (
        r"(o_proj|out_lin|out_proj|attn\.c_proj|attn\.Wo|SelfAttention\.o\b|attention\.output\.dense)",
        "attention: output",
    ),
    (r"(mlp\.gate\b|moe\.gate\b|\brouter\b)", "experts: router"),
    (r"experts\b.*(gate_up_proj)", "experts: gates and up"),
    (r"experts\b.*(down_proj)", "experts: down"),
    (r"(gate_up_proj|mlp\.Wi)", "MLP: gate and up"),
    (r"(gate_proj|wi_0)", "MLP: gate"),
    (r"(up_proj|wi_1|\bwi\b|fc1|lin1|c_fc|intermediate\.dense)", "MLP: up"),
    (r"(down_proj|\bwo\b|\bWo\b|fc2|lin2|mlp\.c_proj|output\.dense)", "MLP: down"),
)
"""Patterns of parameter names, the more special first, and what such a weight does."""

_PEFT = re.compile(r"\.base_layer|\.modules_to_save\.[^.]+")
"""What PEFT puts into a parameter's name."""


def stack_module(model: Any, side: str) -> Any | None:
    """The module that holds the blocks: the whole model's, or that of its "encoder" or "decoder" side."""
    for name, module in model.named_modules():
        if side and side not in name.split("."):
            continue
        if any(_is_blocks(child) for child in module.children()):
            return module
    return None


def blocks_of(stack: Any) -> Any:
    """The list of blocks directly in `stack`."""
    return next(child for child in stack.children() if _is_blocks(child))


def _is_blocks(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1 and len(module) > 0


def find_blocks(model: Any, side: str = "") -> list[Any]:
    """The blocks of the whole model, or of its "encoder" or "decoder" side, in order; none where they are not found."""
    stack = stack_module(model, side)
    return list(blocks_of(stack)) if stack is not None else []


def build_anatomy(
    model: Any, config: Any, kind: ModelKind, model_dir: Path, *, positions: int, order: Order
) -> Anatomy:
    """The transformers `model` loaded from `model_dir`; `positions` is the prompt's length.

    `order` is how it worked on it.
    """
    text = config.get_text_config()
    names = {"decoder": [""], "encoder": [""], "encoder-decoder": ["encoder", "decoder"]}[kind]
    stacks = [
        _stack(model, side, side or kind, getattr(config, side, None) or config if side else config, positions, order)
        for side in names
    ]
    outside = list(_outside(model, order))
    head, embedded = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and embedded is not None and head.weight is embedded.weight
    types = _stored_types(model_dir, config)
    stacks = [_stored(_completed(stack, outside, stacks), types) for stack in stacks]
    return Anatomy(
        name=model_dir.resolve().name,
        path=model_dir,
        architecture=str((config.architectures or [type(model).__name__])[0]),
        kind=kind,
        parameters=sum(one.numel() for name, one in _plain_parameters(model) if "bottleneck" not in name),
        context=text_positions(text.to_dict()) or 0,
        vocabulary=int(getattr(text, "vocab_size", 0) or 0),
        file_type=", ".join(sorted({*types.values()})),
        stacks=tuple(stacks),
        tied=tied,
    )


def _stored_types(model_dir: Path, config: Any) -> dict[str, str]:
    """Name of a weight → how the files in `model_dir` store it: torch computes in another type."""
    headers = [read_safetensors_header(path)[0] for path in safetensors_files(model_dir)]
    tensors = {name: entry for header in headers for name, entry in header.items()}
    known = checkpoint_parameters(tensors, config.to_dict())
    return {name: str(entry["dtype"]) for name, entry in tensors.items() if entry["dtype"] in known}


def _stored(stack: Stack, types: dict[str, str]) -> Stack:
    """`stack` with the types of its weights in the files; of one that has another name there, that of the most."""
    most = max(set(types.values()), key=[*types.values()].count)
    is_mixed = len(set(types.values())) > 1

    def typed(parts: tuple[Part, ...]) -> tuple[Part, ...]:
        names = {part.name: next((t for name, t in types.items() if name.endswith(part.name)), most) for part in parts}
        return tuple(replace(part, type=names[part.name] if is_mixed else most) for part in parts)

    blocks = tuple(map(typed, stack.blocks))
    return replace(stack, embedding=typed(stack.embedding), blocks=blocks, head=typed(stack.head))


def _stack(model: Any, side: str, name: str, config: Any, positions: int, order: Order) -> Stack:
    module = stack_module(model, side)
    blocks = tuple(tuple(with_norms(_parts(block, order))) for block in blocks_of(module)) if module is not None else ()
    text = config if side else config.get_text_config()

    def number(*keys: str) -> int:
        return next((int(value) for key in keys if isinstance(value := getattr(text, key, None), int)), 0)

    heads = number(f"{side}_attention_heads", "num_attention_heads", "num_heads", "n_head", "n_heads")
    hidden = number("hidden_size", "d_model", "n_embd", "dim")
    head_size = number("head_dim", "d_kv") or (hidden // heads if heads else 0)
    rope = _rope(module, text, positions) if module is not None else None
    has_positions = any(re.search(r"position\w*embed|embed_positions|\bwpe\b", n) for n, _ in model.named_modules())
    relative = any("relative_attention_bias" in part.name for block in blocks for part in block)
    table = "sinusoidal" if any("Sinusoidal" in type(one).__name__ for one in model.modules()) else "learned"
    return Stack(
        name=name,
        layers=len(blocks),
        hidden_size=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads") or heads,
        head_size=head_size,
        positions="rotary" if rope else "relative" if relative else table if has_positions else "none",
        embedding=(),
        blocks=blocks,
        rope=rope,
        window=_window(text),
    )


def _completed(stack: Stack, outside: list[Part], stacks: list[Stack]) -> Stack:
    """`stack` with the weights around its blocks; those that name no side are the first one's, or the last one's.

    The table that two sides share is in both.
    """

    def is_its(part: Part) -> bool:
        named = [one.name for one in stacks if one.name in part.name.split(".")]
        if not named and "shared" in part.name.split("."):
            return True
        default = stacks[0] if _is_embedding(part.name) else stacks[-1]
        return (named[0] if named and len(stacks) > 1 else default.name) == stack.name

    mine = [part for part in outside if is_its(part)]
    head = [part for part in mine if not _is_embedding(part.name)]
    if head and head[0].role == "norm":
        head = [replace(part, role=f"final {part.role}") if part.role.startswith("norm") else part for part in head]
    return replace(stack, embedding=tuple(part for part in mine if _is_embedding(part.name)), head=tuple(head))


def _is_embedding(name: str) -> bool:
    return bool(re.search(r"embed|shared|\bwte\b|\bwpe\b", name))


def _parts(module: Any, order: Order) -> list[Part]:
    """Every weight of `module` in the order of computation; an adapter's is told as a rank on the one it changes."""
    names = [name for name, _ in _plain_parameters(module)]
    places = [place(module, name, order) for name in names]
    return [part for _, part in sorted(zip(places, _iter_parts(module), strict=True), key=lambda pair: pair[0])]


def _iter_parts(module: Any) -> Iterator[Part]:
    ranks: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        if "lora_A" in name:
            ranks.setdefault(name.split(".lora_A")[0], []).append(int(parameter.shape[0]))
    for name, parameter in _plain_parameters(module):
        plain = _PEFT.sub("", name)
        is_turned = type(module.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        yield Part(
            name=plain,
            role=_role(plain),
            shape=tuple(reversed(parameter.shape)) if is_turned else tuple(parameter.shape),
            type=str(parameter.dtype).removeprefix("torch."),
            parameters=parameter.numel(),
            adapted=tuple(ranks.get(plain.rpartition(".")[0], ())) if plain.endswith("weight") else (),
        )


def _role(name: str) -> str:
    role = next((role for pattern, role in _ROLES if re.search(pattern, name)), name.rpartition(".")[0])
    return f"{role} (bias)" if name.endswith("bias") and "relative" not in name else role


def _outside(model: Any, order: Order) -> list[Part]:
    """Weights that are in no stack, each once, in the order of computation."""
    inside = {id(p) for m in model.modules() if _is_blocks(m) for p in m.parameters()}
    found = [
        (place(model, name, order), part)
        for part, (name, parameter) in zip(_iter_parts(model), _plain_parameters(model), strict=True)
        if id(parameter) not in inside
    ]
    return [part for _, part in sorted(found, key=lambda pair: pair[0])]


def _plain_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights that are used: without LoRA's, and without what an adapter's whole modules stand for."""
    return (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "original_module" not in name
    )


def _rope(model: Any, config: Any, positions: int) -> Rope | None:
    """What the model's own table of speeds says; of several that of the blocks that see everything."""
    tables = {name: table for name, table in model.named_buffers() if name.endswith("inv_freq")}
    if not tables:
        return None
    whole = [name for name in tables if "sliding" not in name] or list(tables)
    settings = getattr(config, "rope_parameters", None) or {}
    kinds = settings if isinstance(next(iter(settings.values()), None), dict) else {"full_attention": settings}
    bases = {kind: float(values.get("rope_theta") or 10000.0) for kind, values in kinds.items()}
    base = next(iter(bases.values())) if "full_attention" not in bases else bases["full_attention"]
    scaling = str((kinds.get("full_attention") or {}).get("rope_type", "default")).replace("default", "")
    return build_rope(
        tables[whole[0]].float().tolist(),
        base,
        scaling=scaling,
        positions=positions,
        window_base=bases.get("sliding_attention", 0.0),
    )


def _window(config: Any) -> int:
    """Tokens that blocks with a sliding window look at; 0 where there are none."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = "sliding_attention" in kinds and getattr(config, "use_sliding_window", True)
    return (
        int(getattr(config, "sliding_window", None) or getattr(config, "local_attention", None) or 0) if slides else 0
    )
