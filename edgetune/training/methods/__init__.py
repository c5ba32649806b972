"""How a base is adapted, by name. Each method is a small object; `base` says what it answers.

Another package adds one with an entry point in the group "edgetune.methods": NAME = "its.module:method".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgetune.training.registry import Registry

if TYPE_CHECKING:
    from edgetune.training.methods.base import Method

__all__ = ["METHODS", "find_method"]

METHODS: Registry[Method] = Registry(
    "method",
    "edgetune.methods",
    {
        "lora": "edgetune.training.methods.lora:LORA",
        "rslora": "edgetune.training.methods.lora:RSLORA",
        "dora": "edgetune.training.methods.lora:DORA",
        "lora+": "edgetune.training.methods.lora:LORA_PLUS",
        "pissa": "edgetune.training.methods.principal:PISSA",
        "olora": "edgetune.training.methods.principal:OLORA",
        "qlora": "edgetune.training.methods.qlora:QLORA",
        "full": "edgetune.training.methods.full:FULL",
        "houlsby": "edgetune.training.methods.bottleneck:HOULSBY",
        "pfeiffer": "edgetune.training.methods.bottleneck:PFEIFFER",
        "prompt": "edgetune.training.methods.prompt:PROMPT",
    },
)
"""Every known method."""


def find_method(name: str) -> Method:
    """The method called `name`. Raises `UsageError` when there is none."""
    return METHODS.find(name)
