"""A conversation as a JSON file: messages in OpenAI's shape, and the settings they were answered with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgetune.chat.presets import with_values
from edgetune.engine.sampling import Sampling
from edgetune.errors import CorruptFileError, UsageError
from edgetune.paths import home_dir, write_json

_FORMAT = "edgetune-chat"


@dataclass(frozen=True)
class SavedChat:
    """What a chat file holds."""

    messages: list[dict[str, Any]]
    """Every turn; a leading system message is the system prompt."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters by name."""
    model: str = ""
    """Path of the base model, for people."""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    """ "path" and "scale" of the adapters that were applied."""

    def apply_sampling(self, sampling: Sampling) -> Sampling:
        """`sampling` with the saved parameters in it; unknown ones are left out."""
        return with_values(sampling, self.sampling)


def chat_path(name: str) -> Path:
    """Where the chat called `name` is kept: a path as it stands, a bare name in the home."""
    path = Path(name).expanduser()
    if path.suffix == ".json" or len(path.parts) > 1:
        return path
    return home_dir() / "chats" / f"{name}.json"


def save_chat(path: Path, chat: SavedChat) -> None:
    """Write `chat` to `path`, whole or not at all."""
    write_json(path, {"format": _FORMAT, "version": 1, **asdict(chat)})


def load_chat(path: Path) -> SavedChat:
    """Read the chat at `path`: a file of ours, or a JSON list of messages.

    Raises `UsageError` when there is none, `CorruptFileError` when it is something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"There is no saved chat {path}.", hint="Save one with /save NAME.") from None
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.") from error
    values = {"messages": values} if isinstance(values, list) else values
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise CorruptFileError(f"{path} is no saved chat: it lacks a list of messages with role and content.")
    names = {parameter.name for parameter in fields(SavedChat)}
    return SavedChat(**{name: value for name, value in values.items() if name in names})


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
