"""edgetune: adapt a language model on your own machine and run it there, offline.

The public names load on first use, so that `import edgetune` stays instant and chatting never imports torch. What they
do is in `edgetune.api`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.api import (
        Completion,
        Converted,
        Encoder,
        Model,
        TrainSettings,
        convert,
        load,
        load_encoder,
        train,
        verify,
    )
    from edgetune.errors import EdgetuneError, ExitCode

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "Converted",
    "EdgetuneError",
    "Encoder",
    "ExitCode",
    "Model",
    "TrainSettings",
    "__version__",
    "convert",
    "load",
    "load_encoder",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "edgetune.errors" if name in ("EdgetuneError", "ExitCode") else "edgetune.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
