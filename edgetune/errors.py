"""The exit codes and the error tree that every layer raises from.

An error says what happened, with the offending value, in one sentence, and carries a hint: what to do or which
command to run. Stages raise; only the front ends catch, print and exit. Nothing here formats or prints.

    EdgetuneError              1  something failed
    ├── CorruptFileError       1  a file is empty, truncated or lies about itself
    ├── UsageError             2  a flag, a path or a setting is wrong
    │   └── DataError          2  a dataset or one of its rows is wrong
    ├── UnsupportedError       3  a model or adapter that cannot be represented
    │   └── MismatchError      3  a model, adapter or tokenizer that does not belong to the other
    ├── ParityError            4  what would run is not what was trained
    ├── ResourceError          5  out of memory or disk
    └── InterruptedRun       130  the user stopped it
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; scripts rely on these."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNSUPPORTED = 3
    PARITY = 4
    RESOURCES = 5
    INTERRUPTED = 130


class EdgetuneError(Exception):
    """Something failed in a way a person can act on."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        """One sentence: what happened, with the offending value."""
        self.hint = hint
        """What to do next, or the command to run; empty when there is nothing to add."""


class CorruptFileError(EdgetuneError):
    """A file is empty, truncated, or its header does not match its content."""


class UsageError(EdgetuneError):
    """A flag, a path or a setting is wrong."""

    exit_code = ExitCode.USAGE


class DataError(UsageError):
    """A dataset, or one of its rows, is not what was expected; the message names file and line."""


class UnsupportedError(EdgetuneError):
    """A model or adapter that cannot be represented exactly; the hint names the way out."""

    exit_code = ExitCode.UNSUPPORTED


class MismatchError(UnsupportedError):
    """Two artefacts that do not belong together: another base, another tokenizer."""


class ParityError(EdgetuneError):
    """What llama.cpp would run differs from what torch trained by more than the bound."""

    exit_code = ExitCode.PARITY


class ResourceError(EdgetuneError):
    """Memory or disk does not suffice."""

    exit_code = ExitCode.RESOURCES


class InterruptedRun(EdgetuneError):
    """The user stopped a stage; what was done is kept, and the hint says how to go on."""

    exit_code = ExitCode.INTERRUPTED
