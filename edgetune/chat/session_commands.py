"""Commands on the chats that are kept: find, resume, name, export; and chats as files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import get_args

from edgetune.chat.database import SavedSession
from edgetune.chat.exports import ExportKind, export
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.store import SavedChat, chat_path, load_chat, save_chat
from edgetune.errors import UsageError

EXPORTS: tuple[ExportKind, ...] = get_args(ExportKind)
_LISTED = 20


def sessions(chat: OpenChat, arguments: str) -> Outcome:
    """List the chats, or delete one."""
    verb, _, key = arguments.partition(" ")
    if verb == "delete" and key.strip():
        saved = chat.database.find(key.strip())
        if saved.id == chat.saving.session_id and chat.conversation.tree.nodes:
            raise UsageError("This is the chat you are in.", hint="/clear begins another one.")
        chat.database.delete(saved.id)
        return Outcome(f"Deleted: {saved.title or saved.id}")
    if arguments:
        raise UsageError("/sessions takes nothing, or: delete ID.", hint="/search finds chats by what was said.")
    found = chat.database.sessions(limit=_LISTED)
    return Outcome("" if found else "No chats are kept yet.", rows=tuple(map(_row, found)))


def search(chat: OpenChat, arguments: str) -> Outcome:
    """Find messages in all chats."""
    if not arguments:
        raise UsageError("/search takes the words to look for.")
    found = chat.database.search(arguments, limit=_LISTED)
    rows = tuple((one.session.id[:8], f"{one.session.title}: {one.excerpt}") for one in found)
    return Outcome("" if rows else f"Nothing was found for {arguments!r}.", rows=rows)


def resume(chat: OpenChat, arguments: str) -> Outcome:
    """Go on with a chat: the one named, or the last one."""
    if arguments:
        return resume_session(chat, chat.database.find(arguments))
    others = [one for one in chat.database.sessions() if one.id != chat.saving.session_id]
    if not others:
        raise UsageError("There is no other chat to resume.")
    return resume_session(chat, others[0])


def resume_session(chat: OpenChat, saved: SavedSession) -> Outcome:
    """Go on with `saved`."""
    restored = chat.saving.resume(chat.conversation, saved)
    conversation, draft = chat.conversation, ""
    lines = [f"Resumed: {saved.title or saved.id[:8]}, {len(conversation.messages)} messages."]
    if conversation.messages and conversation.messages[-1]["role"] == "user":
        # Its process ended before the first word of the reply.
        draft = conversation.undo()
        lines.append("The last message has no reply yet; it can be sent again.")
    if restored:
        lines.append(f"{restored} tokens of it need no evaluation.")
    if saved.fingerprint and chat.session.fingerprint and saved.fingerprint != chat.session.fingerprint:
        lines.append(f"It was held with another model: {saved.model}")
    lines += _missing(chat, saved.adapters)
    return Outcome("\n".join(lines), draft=draft, moved=True)


def title(chat: OpenChat, arguments: str) -> Outcome:
    """Show or set the chat's title."""
    saved = [one for one in chat.database.sessions() if one.id == chat.saving.session_id]
    if not saved:
        raise UsageError("This chat is not kept yet.", hint="Say something first.")
    if arguments:
        chat.database.rename(saved[0].id, arguments)
    return Outcome(arguments or saved[0].title)


def export_chat(chat: OpenChat, arguments: str) -> Outcome:
    """Write the chat as Markdown or training data."""
    word, _, rest = arguments.partition(" ")
    kind = next((kind for kind in EXPORTS if kind == word), None)
    name = rest.strip() if kind else arguments
    if not name:
        raise UsageError(
            f"/export takes: [{', '.join(EXPORTS)}] FILE.",
            hint="For example: /export chat.md, /export pairs mine.jsonl",
        )
    path = Path(name).expanduser()
    conversation = chat.conversation
    kind = kind or ("jsonl" if path.suffix in (".jsonl", ".json") else "markdown")
    count = export(path, conversation.tree, kind=kind, title=_title(chat), system=conversation.system)
    what = {"markdown": "messages", "pairs": "pairs", "verdicts": "verdicts"}.get(kind, "rows")
    note = "" if kind == "markdown" else f" Train on it: edgetune train -d {path}"
    return Outcome(f"{count} {what if count != 1 else what.removesuffix('s')} in {path}.{note}")


def save(chat: OpenChat, arguments: str) -> Outcome:
    """Write the chat and its settings to a file."""
    if not arguments:
        raise UsageError("/save takes a name or a path.", hint="For example: /save notes")
    conversation, engine = chat.conversation, chat.session.engine
    start = [{"role": "system", "content": conversation.system}] if conversation.system else []
    path = chat_path(arguments)
    saved = SavedChat(
        messages=[*start, *conversation.messages],
        sampling=asdict(conversation.sampling),
        model=str(engine.path),
        adapters=[{"path": str(adapter.path), "scale": adapter.scale} for adapter in engine.adapters],
    )
    save_chat(path, saved)
    return Outcome(f"Saved to {path}")


def load(chat: OpenChat, arguments: str) -> Outcome:
    """Read a chat from a file."""
    if not arguments:
        raise UsageError("/load takes a name or a path.", hint="For example: /load notes")
    loaded = load_chat(chat_path(arguments))
    conversation = chat.conversation
    sampling = loaded.apply_sampling(conversation.sampling)
    chat.leave_tree()
    conversation.sampling = sampling
    conversation.replace(loaded.messages)
    lines = [f"Loaded {len(conversation.messages)} messages.", *_missing(chat, loaded.adapters)]
    return Outcome("\n".join(lines), moved=True)


def _missing(chat: OpenChat, adapters: Iterable[object]) -> list[str]:
    here = {(str(one.path), one.scale) for one in chat.session.engine.adapters if one.scale}
    held = [(str(one.get("path")), one.get("scale", 1.0)) for one in adapters if isinstance(one, dict)]
    return [
        f"It was held with the adapter {path} at {scale:g}: /lora {path} {scale:g}"
        for path, scale in held
        if scale and (path, scale) not in here
    ]


def _title(chat: OpenChat) -> str:
    if chat.autosave is None:
        return ""
    saved = [one for one in chat.database.sessions() if one.id == chat.autosave.session_id]
    return saved[0].title if saved else ""


def _row(saved: SavedSession) -> tuple[str, str]:
    when = datetime.fromisoformat(saved.updated).astimezone().strftime("%Y-%m-%d %H:%M")
    model = Path(saved.model).stem
    return saved.id[:8], f"{when}  {saved.title or '-'} ({saved.messages} messages, {model})"
