"""Writes `docs/cli.md` and `docs/chat.md` from the commands themselves: `make docs`. A test compares them with that."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from edgetune.chat.commands import commands_page
from edgetune.cli.main import VERBS, edgetune

PAGE = Path(__file__).with_name("cli.md")
CHAT_PAGE = Path(__file__).with_name("chat.md")


def command_line_page() -> str:
    """The help of every command, as Markdown."""
    pages = [
        "# Command line\n",
        "Made by `make docs` from the commands themselves.\n",
        f"```text\n{_help(edgetune, 'edgetune')}\n```\n",
    ]
    for verb, (module, _) in VERBS.items():
        command = import_module(module).command
        pages.append(f"## edgetune {verb}\n\n```text\n{_help(command, f'edgetune {verb}')}\n```\n")
        if isinstance(command, click.Group):
            for name, child in sorted(command.commands.items()):
                pages.append(f"### edgetune {verb} {name}\n\n```text\n{_help(child, f'edgetune {verb} {name}')}\n```\n")
    return "\n".join(pages)


def _help(command: click.Command, name: str) -> str:
    context = click.Context(
        command,
        info_name=name,
        max_content_width=110,
        terminal_width=110,
        help_option_names=edgetune.context_settings["help_option_names"],
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


if __name__ == "__main__":
    PAGE.write_text(command_line_page(), encoding="utf-8")
    CHAT_PAGE.write_text(commands_page(), encoding="utf-8")
