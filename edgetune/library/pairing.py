"""Whether an adapter belongs on a base, told from their headers before llama.cpp sees either.

llama.cpp itself checks the architecture and the tensors' shapes, and aborts the process on an adapter for tied
embeddings. Two models of one family and size pass its check; their fingerprints do not pass this one.
"""

from __future__ import annotations

from edgetune.adapter_fit import check_runnable
from edgetune.artifacts import Gguf
from edgetune.errors import MismatchError
from edgetune.gguf_header import GgufHeader, gguf_from_header, read_gguf_header

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


def _check_fingerprints(base: Gguf, adapter: Gguf) -> None:
    differing = adapter.fingerprint.differences(base.fingerprint)
    # Another template alone is no other model: the adapter brings the one it was trained with.
    if differing in ([], ["template"]):
        return
    verb = "differs" if len(differing) == 1 and differing != ["weights"] else "differ"
    what = " and ".join([", ".join(differing[:-1]), differing[-1]] if len(differing) > 1 else differing)
    trained_on = f"{adapter.base_name!r}" if adapter.base_name else "another base"
    raise MismatchError(
        f"{adapter.path} was trained on {trained_on}, not on {base.path} ({base.base_name or 'no name'!r}): "
        f"{what.replace('weights', 'the weights', 1)} {verb}.",
        hint=_FORCE,
    )
