"""`edgetune models`: list, show and remove what the library knows, or print a model's path."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from edgetune import library
from edgetune.artifacts import Fingerprint

_KINDS = {"checkpoint": "Hugging Face", "run": "training run", "model": "GGUF", "adapter": "GGUF adapter"}
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@_json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List, show and remove models on this machine; alone, list them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_command, as_json=as_json)


@command.command("list")
@_json_option
def list_command(as_json: bool) -> None:
    """List the models, adapters and runs that can be named here."""
    entries = library.list_models()
    if as_json:
        rows = [
            {**asdict(entry), "path": str(entry.path), "bytes": library.disk_bytes(entry.path)} for entry in entries
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "kind", "size", "changed", "path"):
        table.add_column(title, justify="right" if title == "size" else "left", overflow="fold")
    for entry in entries:
        added = "comes with edgetune" if entry.embedded else f"{datetime.fromtimestamp(entry.added):%Y-%m-%d %H:%M}"
        size = format_bytes(library.disk_bytes(entry.path))
        table.add_row(escape(entry.name), _KINDS[entry.kind], size, added, escape(str(entry.path)))
    Console().print(table)


@command.command("show")
@click.argument("model")
@_json_option
def show(model: str, as_json: bool) -> None:
    """Show what MODEL (a path or a name) is: sizes, types, fingerprint, template, and the adapters that fit."""
    description = library.describe(library.find_model(model))
    adapters = library.adapters_for(description.fingerprint) if description.kind in ("checkpoint", "model") else []
    if as_json:
        values: dict[str, Any] = asdict(description)
        values |= {**values.pop("sizes"), "path": str(description.path), "adapters": [str(path) for path in adapters]}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for title, value in _rows(description):
        if value:
            table.add_row(title, escape(value))
    if description.kind in ("checkpoint", "model"):
        table.add_row("adapters", escape("\n".join(map(str, adapters))) if adapters else "none known for this base")
    Console().print(table)


@command.command("rm")
@click.argument("model")
@click.option("--delete", is_flag=True, help="Delete the GGUF file as well.")
def remove(model: str, delete: bool) -> None:
    """Forget MODEL; a file in the library's own folder is deleted, others only with --delete."""
    entry = library.remove(model, delete=delete)
    gone = "Deleted" if not entry.path.exists() else "Forgot"
    click.echo(f"{gone} {entry.path}", err=True)


@command.command("path")
@click.argument("model")
def path(model: str) -> None:
    """Print MODEL's path."""
    click.echo(library.find_model(model))


def format_bytes(count: float) -> str:
    """`count` bytes in the unit that leaves at most four digits before the point."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _rows(description: library.Description) -> list[tuple[str, str]]:
    sizes = description.sizes
    heads = f"{sizes.heads}" if sizes.heads else ""
    if sizes.heads and sizes.kv_heads and sizes.kv_heads != sizes.heads:
        heads += f" ({sizes.kv_heads} for keys and values)"
    return [
        ("name", description.name),
        ("kind", _KINDS[description.kind]),
        ("path", str(description.path)),
        ("architecture", description.architecture),
        ("parameters", f"{description.parameters:,}"),
        ("layers", _number(sizes.layers)),
        ("hidden size", _number(sizes.hidden_size)),
        ("heads", heads),
        ("context", _number(sizes.context)),
        ("vocabulary", _number(sizes.vocabulary)),
        ("types", _types(description)),
        ("size", format_bytes(description.bytes)),
        ("chat template", "yes" if description.has_template else "no"),
        ("base", description.base_name if description.kind in ("run", "adapter") else ""),
        ("fingerprint", _fingerprint(description.fingerprint)),
    ]


def _types(description: library.Description) -> str:
    shares = ", ".join(
        f"{name} {count / max(description.parameters, 1):.0%}" for name, count in description.types.items()
    )
    return f"{description.file_type}: {shares}" if description.file_type else shares


def _fingerprint(fingerprint: Fingerprint) -> str:
    known = {part: value for part, value in asdict(fingerprint).items() if value}
    return "  ".join(f"{part} {value[:12]}" for part, value in known.items()) or "unknown (not made by edgetune)"


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else ""
