"""Commands that walk and grow the conversation's tree."""

from __future__ import annotations

from edgetune.chat.conversation import Vote
from edgetune.chat.open_chat import OpenChat, Outcome
from edgetune.chat.templates import PLACE, delete_template, fill_template, load_template, save_template, template_names
from edgetune.chat.token_commands import branch_at
from edgetune.chat.tree import Node
from edgetune.errors import UsageError

_SHOWN = 60


def retry(chat: OpenChat, arguments: str) -> Outcome:
    """Answer the last message again, beside the answer it has."""
    return Outcome(reply=chat.conversation.retry())


def undo(chat: OpenChat, arguments: str) -> Outcome:
    """Go back before the last message."""
    return Outcome(f"Taken back: {chat.conversation.undo()}", moved=True)


def edit(chat: OpenChat, arguments: str) -> Outcome:
    """Put another text in the place of the last message or reply."""
    word, _, rest = arguments.partition(" ")
    is_reply = word == "reply"
    node = chat.last("assistant" if is_reply else "user")
    text = rest.strip() if is_reply else arguments
    if not text:
        return Outcome(draft=f"/edit {'reply ' if is_reply else ''}{node.content}")
    reply = chat.conversation.edit(node.id, text)
    return Outcome("" if reply else "The reply is yours now; the old one stays on its branch.", reply=reply, moved=True)


def branch(chat: OpenChat, arguments: str) -> Outcome:
    """Show the branches, go to one, or begin or continue the last reply otherwise."""
    conversation = chat.conversation
    word, _, rest = arguments.partition(" ")
    if word == "from":
        if not rest.strip():
            raise UsageError("/branch from takes the words that the reply begins with.")
        return Outcome(reply=conversation.begin_reply(rest), moved=True)
    if word and rest:
        return branch_at(chat, word, rest.strip())
    leaves = conversation.tree.leaves()
    if not arguments:
        return Outcome("" if leaves else "Nothing was said yet.", rows=tuple(_branch_row(chat, leaves)))
    if not arguments.isdecimal() or not 1 <= int(arguments) <= len(leaves):
        raise UsageError(f"There is no branch {arguments!r}.", hint="/branch lists them by number.")
    node = conversation.select(leaves[int(arguments) - 1].id)
    return Outcome(_one_line(node), moved=True)


def vote(chat: OpenChat, arguments: str) -> Outcome:
    """Mark the last reply as good or bad."""
    node = chat.last("assistant")
    votes: dict[str, Vote] = {"up": "up", "down": "down", "off": ""}
    if arguments not in votes:
        raise UsageError("/vote takes: up, down or off.")
    chat.conversation.vote(node.id, votes[arguments])
    if arguments == "off":
        return Outcome("The vote is taken back.")
    return Outcome(f"Voted {arguments}. /export rows, pairs or verdicts FILE makes training data of votes.")


def tool(chat: OpenChat, arguments: str) -> Outcome:
    """Answer a tool call by hand, and let the model go on."""
    if not arguments:
        raise UsageError("/tool takes the tool's answer.", hint='For example: /tool {"temperature": 21}')
    return Outcome(reply=chat.conversation.ask(arguments, role="tool"))


def template(chat: OpenChat, arguments: str) -> Outcome:
    """Show, use, save or delete prompt templates."""
    verb, _, rest = arguments.partition(" ")
    if not verb:
        rows = tuple((name, _short(load_template(name))) for name in template_names())
        return Outcome("" if rows else f"No prompt templates yet: /template save NAME TEXT, with {PLACE} in it.", rows)
    if verb == "save":
        name, _, text = rest.strip().partition(" ")
        return Outcome(f"Saved to {save_template(name, text)}")
    if verb == "delete":
        delete_template(rest.strip())
        return Outcome(f"Prompt template {rest.strip()} deleted.")
    if not rest.strip() and PLACE in load_template(verb):
        return Outcome(draft=fill_template(verb, ""))
    return Outcome(reply=chat.say(fill_template(verb, rest.strip())))


def clear(chat: OpenChat, arguments: str) -> Outcome:
    """Begin anew."""
    chat.leave_tree()
    chat.conversation.clear()
    kept = " The old chat is in /sessions." if chat.autosave is not None else ""
    return Outcome(f"Everything said is forgotten.{kept}", moved=True)


def _branch_row(chat: OpenChat, leaves: list[Node]) -> list[tuple[str, str]]:
    tree = chat.conversation.tree
    rows = []
    for number, leaf in enumerate(leaves, 1):
        here = "*" if leaf.id == tree.head else " "
        rows.append((f"{here} {number}", f"{len(tree.path(leaf.id))} messages, ends: {_one_line(leaf)}"))
    return rows


def _one_line(node: Node) -> str:
    return f"{node.role}: {_short(node.content)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
