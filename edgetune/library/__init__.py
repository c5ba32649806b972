"""The library: which models, adapters and runs this machine knows, how a name becomes a path, and what fits to what.

It records where files are and reads what their headers say; it loads no weights, moves nothing and downloads nothing.
"""

from __future__ import annotations

from edgetune.library.describe import Description, checkpoint_architecture, describe, disk_bytes, read_config
from edgetune.library.duty import Duty
from edgetune.library.index import (
    EMBEDDED_NAME,
    Entry,
    Kind,
    classify,
    embedded_model_dir,
    entry_name,
    list_models,
    register,
    remove,
)
from edgetune.library.lookup import Resolved, adapters_for, find_base_for, find_model, resolve_model
from edgetune.library.pairing import check_pair, check_pair_headers
from edgetune.library.purpose import Purpose, purpose_of
from edgetune.library.sizes import Sizes

__all__ = [
    "EMBEDDED_NAME",
    "Description",
    "Duty",
    "Entry",
    "Kind",
    "Purpose",
    "Resolved",
    "Sizes",
    "adapters_for",
    "check_pair",
    "check_pair_headers",
    "checkpoint_architecture",
    "classify",
    "describe",
    "disk_bytes",
    "embedded_model_dir",
    "entry_name",
    "find_base_for",
    "find_model",
    "list_models",
    "purpose_of",
    "read_config",
    "register",
    "remove",
    "resolve_model",
]
