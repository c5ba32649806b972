"""Checkpoint, run or adapter → a GGUF file that is proved to be the same, or an error that says what differs."""

from edgetune.conversion.jobs import Job
from edgetune.conversion.proved import Converted, convert

__all__ = ["Converted", "Job", "convert"]
