"""What the converters raise: one sentence on what happened, and a hint on what to do.

    ConverterError
    ├── CorruptCheckpoint     a file is broken, truncated, or lies about itself
    ├── UnsupportedModel      a base model that GGUF, or llama.cpp's graph for it, cannot hold exactly
    └── UnsupportedAdapter    an adapter that a GGUF adapter cannot hold exactly

Their own tree: the converters know nothing of the program around them.
"""

from __future__ import annotations


class ConverterError(Exception):
    """A conversion that cannot be done, or not exactly."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        """One sentence: what happened, with the offending value."""
        self.hint = hint
        """What to do next; empty when there is nothing to add."""


class CorruptCheckpoint(ConverterError):
    """A checkpoint file is empty, truncated, or its header does not match its content."""


class UnsupportedModel(ConverterError):
    """A base model that cannot be represented exactly."""


class UnsupportedAdapter(ConverterError):
    """An adapter that cannot be represented exactly; merging it into its base may work."""
