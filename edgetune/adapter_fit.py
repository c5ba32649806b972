"""Whether llama.cpp can apply an adapter to a base exactly, told from their headers before it sees either.

llama.cpp aborts the process on some pairs and leaves parts of others out; nothing that is refused here can be forced.
Whether the adapter was trained on that base is another question, the library's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgetune.artifacts import Gguf
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, TensorInfo, gguf_from_header, read_gguf_header

_MERGE = "Merge it into the base instead: edgetune convert BASE_DIR --merge ADAPTER_DIR"


def check_runnable(base: GgufHeader, adapter: GgufHeader) -> None:
    """Raise unless llama.cpp can run `adapter` on `base`: kinds, architecture, the tensors' names and shapes.

    Raises `UsageError` when one is not what it is taken for, `MismatchError` for another architecture or other shapes,
    `UnsupportedError` for what llama.cpp crashes on or leaves out, `CorruptFileError` for an incomplete adapter.
    """
    base_gguf, adapter_gguf = gguf_from_header(base), gguf_from_header(adapter)
    if base_gguf.kind != "model":
        raise UsageError(f"{base.path} is an adapter, not a model.", hint=f"Give it with --lora {base.path}")
    if adapter_gguf.kind != "adapter":
        raise UsageError(f"{adapter.path} is a model, not an adapter.", hint="Give it as MODEL, without --lora.")
    if base.architecture != adapter.architecture:
        raise MismatchError(
            f"{adapter.path} is for a {adapter.architecture!r} model and {base.path} is a {base.architecture!r} model.",
            hint=_named_base(adapter_gguf),
        )
    kind = adapter.metadata.get("adapter.type")
    if kind != "lora":
        raise UnsupportedError(f"{adapter.path} is an adapter of type {kind!r}; llama.cpp runs LoRA adapters only.")
    if "adapter.alora.invocation_tokens" in adapter.metadata:
        raise UnsupportedError(
            f"{adapter.path} is an activated LoRA, which is switched on by words inside the text.",
            hint="llama-server can run it; edgetune cannot.",
        )
    shapes = {tensor.name: tensor.shape for tensor in with_all_shards(base).tensors}
    for name, pair in _pairs(adapter).items():
        _check_tensor(name, pair, base, shapes, adapter_gguf)


def with_all_shards(header: GgufHeader) -> GgufHeader:
    """`header` with the tensors of every file of a model that is split over several, of which it is the first."""
    shards = header.metadata.get("split.count", 0)
    if not isinstance(shards, int) or shards < 2:
        return header
    prefix = str(header.path).removesuffix(f"-00001-of-{shards:05d}.gguf")
    others = [Path(f"{prefix}-{number:05d}-of-{shards:05d}.gguf") for number in range(2, shards + 1)]
    tensors = [tensor for path in others for tensor in read_gguf_header(path).tensors]
    return replace(header, tensors=[*header.tensors, *tensors])


def _pairs(adapter: GgufHeader) -> dict[str, dict[str, TensorInfo]]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in adapter.tensors:
        name, _, side = tensor.name.rpartition(".")
        if side in ("lora_a", "lora_b"):
            pairs.setdefault(name, {})[side] = tensor
        else:
            # Norms among them: llama.cpp reads over those without a word.
            raise UnsupportedError(
                f"{adapter.path} holds {tensor.name!r}, which llama.cpp does not take from a LoRA adapter.", hint=_MERGE
            )
    return pairs


def _check_tensor(
    name: str,
    pair: dict[str, TensorInfo],
    base: GgufHeader,
    shapes: dict[str, tuple[int, ...]],
    adapter: Gguf,
) -> None:
    if len(pair) != 2:
        raise CorruptFileError(f"{adapter.path} lacks one half of the adapter of {name!r}.", hint="Convert it again.")
    has_head = base.metadata.get(f"{base.architecture}.attention.causal") is not False
    if has_head and name in ("token_embd.weight", "output.weight") and "output.weight" not in shapes:
        raise UnsupportedError(
            f"{adapter.path} adapts {name!r}, which {base.path} uses as embedding and as head at once; "
            "llama.cpp cannot keep the two apart.",
            hint=_MERGE,
        )
    if name not in shapes:
        raise MismatchError(
            f"{adapter.path} adapts {name!r}, which {base.path} does not have.", hint=_named_base(adapter)
        )
    down, up = _two(pair["lora_a"].shape), _two(pair["lora_b"].shape)
    shape = shapes[name]
    # The embedding's pair is stored the other way round: rows are looked up in A, B maps them to the hidden size.
    columns, rows = (up[1], down[1]) if name == "token_embd.weight" else (down[0], up[1])
    ranks = (down[0], up[0]) if name == "token_embd.weight" else (down[1], up[0])
    if (columns, rows) != _two(shape) or pair["lora_a"].shape[2:] != shape[2:] or ranks[0] != ranks[1]:
        here = " × ".join(str(size) for size in reversed(shape))
        raise MismatchError(
            f"{adapter.path} adapts {name!r} as {rows} × {columns}; in {base.path} it is {here}.",
            hint=_named_base(adapter),
        )


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    padded = (*shape, 1, 1)
    return padded[0], padded[1]


def _named_base(adapter: Gguf) -> str:
    return f"Its base is {adapter.base_name!r}." if adapter.base_name else "Use the base it was trained on."
