"""A model's name, path or run → a model that is open, on the engine that can run it. For every front end."""

from edgetune.opening.encoders import open_encoder
from edgetune.opening.files import DEFAULT_MODEL, ModelChoice, as_gguf, choose_model
from edgetune.opening.writers import Writer, open_session, open_writer

__all__ = [
    "DEFAULT_MODEL",
    "ModelChoice",
    "Writer",
    "as_gguf",
    "choose_model",
    "open_encoder",
    "open_session",
    "open_writer",
]
