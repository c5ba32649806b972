"""Which adapters on this machine fit a model, as GGUF files."""

from __future__ import annotations

from pathlib import Path

from edgetune.artifacts import Fingerprint
from edgetune.chat.adapters import find_adapter
from edgetune.errors import EdgetuneError
from edgetune.library import adapters_for


def fitting_adapters(weights: str) -> list[Path]:
    """Files of adapters that were trained on the base with this fingerprint; a run without one yet is left out."""
    found: dict[Path, None] = {}
    for path in adapters_for(Fingerprint(weights=weights)):
        try:
            found.setdefault(find_adapter(str(path)).path.resolve())
        except (EdgetuneError, OSError):
            continue
    return list(found)
