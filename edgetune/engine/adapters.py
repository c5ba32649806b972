"""Whether a GGUF adapter fits a GGUF base, checked on the headers before llama.cpp sees the pair.

llama.cpp aborts the process for some pairs and applies others half; such a pair must not reach it. Whose adapter it is
(the fingerprints) is the library's question; here it is about structure alone, and structure cannot be forced.
"""

from __future__ import annotations

from edgetune.errors import CorruptFileError, MismatchError, UnsupportedError
from edgetune.gguf_header import GgufHeader

_A, _B = ".lora_a", ".lora_b"
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def check_structure(base: GgufHeader, adapter: GgufHeader) -> None:
    """Raise `MismatchError`, `UnsupportedError` or `CorruptFileError` when `adapter` cannot run on `base` exactly."""
    if adapter.metadata.get("general.type") != "adapter" or adapter.metadata.get("adapter.type") != "lora":
        raise UnsupportedError(
            f"{adapter.path} is not a LoRA adapter.",
            hint="Give an adapter GGUF; `edgetune convert` makes one from a run.",
        )
    if "adapter.alora.invocation_tokens" in adapter.metadata:
        raise UnsupportedError(
            f"{adapter.path} is an activated LoRA, which has to be switched on inside the text.",
            hint="llama-server can run it; edgetune cannot.",
        )
    if adapter.architecture != base.architecture:
        raise MismatchError(
            f"{adapter.path} is for a {adapter.architecture} model; {base.path} is {base.architecture}.",
            hint="Give the base model that the adapter was trained on.",
        )
    shapes = {tensor.name: tensor.shape for tensor in base.tensors}
    for name, (a, b) in _pairs(adapter).items():
        if name not in shapes:
            raise MismatchError(
                f"{adapter.path} changes {name}, which {base.path} does not have.",
                hint="Give the base model that the adapter was trained on.",
            )
        _check_shapes(name, shapes[name], a, b, base=base, adapter=adapter)
        if name == _EMBEDDING and _HEAD not in shapes:
            raise UnsupportedError(
                f"{adapter.path} changes the embedding of {base.path}, to which its head is tied; llama.cpp crashes.",
                hint="Merge it into the base instead: edgetune convert BASE --merge ADAPTER.",
            )


def _pairs(adapter: GgufHeader) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in adapter.tensors:
        name, suffix = tensor.name[: -len(_A)], tensor.name[-len(_A) :]
        if suffix not in (_A, _B):
            raise UnsupportedError(
                f"{adapter.path} holds {tensor.name}, which llama.cpp would ignore or refuse.",
                hint="Merge the adapter into its base instead: edgetune convert BASE --merge ADAPTER.",
            )
        parts.setdefault(name, {})[suffix] = tensor.shape
    for name, pair in parts.items():
        if len(pair) != 2:
            raise CorruptFileError(
                f"{adapter.path} has only one half of its change to {name}.", hint="Convert it again."
            )
    return {name: (pair[_A], pair[_B]) for name, pair in parts.items()}


def _check_shapes(
    name: str,
    weight: tuple[int, ...],
    a: tuple[int, ...],
    b: tuple[int, ...],
    *,
    base: GgufHeader,
    adapter: GgufHeader,
) -> None:
    # ggml's order: a weight is (in, out, experts), A is (in, rank, experts), B is (rank, out, experts). Of an
    # embedding's pair the roles are swapped: A is (rank, vocabulary), B is (rank, width).
    weight, a, b = (_padded(shape) for shape in (weight, a, b))
    if name == _EMBEDDING:
        fits = (weight[0], weight[1]) == (b[1], a[1]) and a[0] == b[0]
    else:
        fits = (weight[0], weight[1]) == (a[0], b[1]) and a[1] == b[0] and weight[2] == a[2] == b[2]
    if not fits:
        raise MismatchError(
            f"{adapter.path} does not fit {base.path}: {name} is {weight[:2]}, the adapter has {a[:2]} and {b[:2]}.",
            hint="Give the base model that the adapter was trained on.",
        )


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1)[: max(3, len(shape))]
