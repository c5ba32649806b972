"""How a base is adapted, by name. Each method is a small object; `base` says what it answers.

Another package adds one with an entry point in the group "edgetune.methods": NAME = "its.module:method".
"""

from __future__ import annotations

from edgetune.training.methods.base import Method
from edgetune.training.registry import Registry

__all__ = ["METHODS", "Method", "find_method"]

METHODS: Registry[Method] = Registry("method", "edgetune.methods", {"lora": "edgetune.training.methods.lora:LORA"})
"""Every known method."""


def find_method(name: str) -> Method:
    """The method called `name`. Raises `UsageError` when there is none."""
    return METHODS.find(name)
