"""Whether an adapter belongs on a base, told from their headers before llama.cpp sees either.

llama.cpp itself checks the architecture and the tensors' shapes, and aborts the process on an adapter for tied
embeddings. Two models of one family and size pass its check; their fingerprints do not pass this one.
"""

from __future__ import annotations

from edgetune.artifacts import Gguf
from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError, UsageError
from edgetune.gguf_header import GgufHeader, TensorInfo, gguf_from_header, read_gguf_header

_FORCE = "Chat with the base it was trained on; --force tries the pair all the same."


def check_pair(base: Gguf, adapter: Gguf) -> None:
    """Raise unless `adapter` can be applied to `base` and was trained on it.

    Raises `MismatchError` naming what differs, `UnsupportedError` for an adapter llama.cpp cannot run on this base,
    `UsageError` when one of them is not what it is taken for, `CorruptFileError` for an incomplete adapter.
    """
    check_pair_headers(read_gguf_header(base.path), read_gguf_header(adapter.path))


def check_pair_headers(base: GgufHeader, adapter: GgufHeader, *, force: bool = False) -> None:
    """As `check_pair`, on headers already read. `force` skips the fingerprints and keeps what would crash llama.cpp."""
    check_runnable(base, adapter)
    if not force:
        _check_fingerprints(gguf_from_header(base), gguf_from_header(adapter))


def check_runnable(base: GgufHeader, adapter: GgufHeader) -> None:
    """The part of `check_pair` that needs no fingerprint: kinds, architecture, the tensors' names and shapes."""
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
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    for name, pair in _pairs(adapter).items():
        _check_tensor(name, pair, base, shapes, adapter_gguf)


def _check_fingerprints(base: Gguf, adapter: Gguf) -> None:
    differing = adapter.fingerprint.differences(base.fingerprint)
    # Another template alone is no other model: the adapter brings the one it was trained with.
    if differing in ([], ["template"]):
        return
    verb = "differs" if len(differing) == 1 else "differ"
    what = " and ".join([", ".join(differing[:-1]), differing[-1]] if len(differing) > 1 else differing)
    trained_on = f"{adapter.base_name!r}" if adapter.base_name else "another base"
    raise MismatchError(
        f"{adapter.path} was trained on {trained_on}, not on {base.path} ({base.base_name or 'no name'!r}): "
        f"{what.replace('weights', 'the weights', 1)} {verb}.",
        hint=_FORCE,
    )


def _pairs(adapter: GgufHeader) -> dict[str, dict[str, TensorInfo]]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in adapter.tensors:
        name, _, side = tensor.name.rpartition(".")
        if side in ("lora_a", "lora_b"):
            pairs.setdefault(name, {})[side] = tensor
        elif not tensor.name.endswith("_norm.weight"):
            raise UnsupportedError(
                f"{adapter.path} holds {tensor.name!r}, which llama.cpp does not take from a LoRA adapter."
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
    if name in ("token_embd.weight", "output.weight") and "output.weight" not in shapes:
        raise UnsupportedError(
            f"{adapter.path} adapts {name!r}, which {base.path} uses as embedding and as head at once; "
            "llama.cpp cannot keep the two apart.",
            hint="Merge it into the base instead: edgetune convert BASE_DIR --merge ADAPTER_DIR",
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
