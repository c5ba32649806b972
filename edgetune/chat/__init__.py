"""Conversations: history, system prompt, context budget, retry and undo, adapters, saving and loading.

Stands between an engine and the front ends. Nothing here reads from or writes to a terminal.
"""

from __future__ import annotations

from edgetune.chat.budget import Forecast, Overflow
from edgetune.chat.conversation import Conversation, Setting
from edgetune.chat.reply import Reply
from edgetune.chat.session import Session, open_session
from edgetune.chat.store import SavedChat, load_chat, save_chat
from edgetune.chat.tree import Node, Tree

__all__ = [
    "Conversation",
    "Forecast",
    "Node",
    "Overflow",
    "Reply",
    "SavedChat",
    "Session",
    "Setting",
    "Tree",
    "load_chat",
    "open_session",
    "save_chat",
]
