"""Writes `docs/cli.md`, `docs/chat.md` and `docs/explain-json.md` from the code itself: `make docs`.

A test compares them with that.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import click

from edgetune.chat.commands import commands_page
from edgetune.cli.attribute_docs import attribute_docs
from edgetune.cli.main import VERBS, edgetune
from edgetune.explain import page as explain_page
from edgetune.explain.page import is_in_json

PAGE = Path(__file__).with_name("cli.md")
CHAT_PAGE = Path(__file__).with_name("chat.md")
EXPLAIN_PAGE = Path(__file__).with_name("explain-json.md")


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


def explain_json_page() -> str:
    """The fields of what `edgetune explain --json` prints, as Markdown."""
    intro = (
        "Made by `make docs` from the values themselves. `edgetune explain MODEL PROMPT --json` prints one "
        "Explanation; numbers have six digits.\n\nOf attention the JSON has what each head looks at most; "
        "`--attention FILE` writes all of it, in float16 as an `.npz` that `numpy.load` reads. Its names are places in "
        "the JSON: `runs.0.stacks.0.attention` is (blocks, heads, tokens that look, tokens looked at), and of a "
        "decoder with a source `runs.0.stacks.1.cross_attention` (blocks, heads, tokens, source tokens)."
    )
    pages = ["# The JSON of `edgetune explain`\n", f"{intro}\n"]
    kinds = [one for one in vars(explain_page).values() if isinstance(one, type) and is_dataclass(one)]
    for kind in reversed(kinds):
        docs = attribute_docs(kind)
        rows = [
            f"| `{name}` | {_json_type(str(annotation))} | {docs.get(name, '').replace('None', 'null')} |"
            for name, annotation in ((one.name, one.type) for one in fields(kind) if is_in_json(one))
        ]
        text = (kind.__doc__ or "").strip()
        pages.append(
            f"## {kind.__name__}\n\n{text}\n\n| field | type | what it says |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(pages)


def _json_type(annotation: str) -> str:
    """What a field's Python type is in JSON."""
    text = annotation.replace("Mapping[str, float]", "object of numbers").replace("Mapping[str, Any]", "object")
    text = re.sub(r"Literal\[(.*)\]", lambda found: found[1].replace(", ", " or "), text)
    text = text.replace("ModelKind", '"decoder" or "encoder" or "encoder-decoder"')
    text = re.sub(r"tuple\[(float, int|int, float)\]", "pairs of numbers", text)
    while (shorter := re.sub(r"tuple\[([^\[\]]*), \.\.\.\]", r"list of \1", text)) != text:
        text = shorter
    for name, known in (
        ("str", "string"),
        ("Path", "string"),
        ("int", "number"),
        ("float", "number"),
        ("bool", "boolean"),
    ):
        text = re.sub(rf"\b{name}\b", known, text)
    return re.sub(r"list of (number|string)\b", r"list of \1s", text).replace(" | None", ", or null").replace("'", '"')


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
    EXPLAIN_PAGE.write_text(explain_json_page(), encoding="utf-8")
