"""The sampling flags of chat and generate, made from the fields of `Sampling`, and the limits of a reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from edgetune.cli.attribute_docs import attribute_docs
from edgetune.engine.sampling import Sampling
from edgetune.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SHORT = {"seed": ["-s"]}
_TYPES = {"seed": click.IntRange(-1, (1 << 32) - 1)}
"""Where llama.cpp takes less than Python has."""
_FROM_FILES = ("grammar_file", "json_schema", "json_schema_file")


def sampling_options(function: _Function) -> _Function:
    """Add a flag for every sampling parameter; collect them with `take_sampling`."""
    docs = attribute_docs(Sampling)
    for field in reversed(fields(Sampling)):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            option = click.option(flag, field.name, is_flag=True, default=field.default, help=docs[field.name])
        else:
            option = click.option(
                *_SHORT.get(field.name, []),
                flag,
                field.name,
                type=_TYPES.get(field.name, type(field.default)),
                default=field.default,
                show_default=field.name != "grammar",
                help=docs[field.name],
            )
        function = option(function)
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    for decorate in (
        click.option("--grammar-file", type=file, help="Read the grammar here."),
        click.option("-j", "--json-schema", metavar="JSON", help="A JSON schema that the reply must follow."),
        click.option("--json-schema-file", type=file, help="Read the JSON schema here."),
        click.option(
            "-n", "--predict", "--n-predict", "max_tokens", type=click.IntRange(min=-1), default=-1, show_default=True,
            help="Most new tokens of a reply; -1 is until the context is full.",
        ),
        click.option("-r", "--stop", "stop", multiple=True, metavar="TEXT", help="End the reply at TEXT; repeatable."),
    ):  # fmt: skip
        function = decorate(function)
    return function


def take_sampling(options: dict[str, Any]) -> Sampling:
    """Remove what `sampling_options` added from `options` (but the limits of a reply) and build the parameters."""
    values = {field.name: options.pop(field.name) for field in fields(Sampling)}
    grammar_path, schema, schema_path = (options.pop(name) for name in _FROM_FILES)
    sources = [source for source in (values["grammar"], grammar_path, schema, schema_path) if source]
    if len(sources) > 1:
        raise UsageError("A reply can follow one grammar or JSON schema.", hint="Give one of them.")
    if grammar_path:
        values["grammar"] = grammar_path.read_text(encoding="utf-8")
    if schema_path:
        schema = schema_path.read_text(encoding="utf-8")
    if schema:
        from edgetune.engine.grammar import grammar_from_json_schema

        values["grammar"] = grammar_from_json_schema(schema)
    return Sampling(**values)
