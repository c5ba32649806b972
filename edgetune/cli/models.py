"""`edgetune models`: list, show and remove what the library knows, or print a model's path."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from edgetune import library
from edgetune.artifacts import RUN_RECORD, Fingerprint
from edgetune.cli.progress import amount
from edgetune.cli.terminal import aligned, table, typed_path
from edgetune.errors import UnsupportedError

_KINDS = {"checkpoint": "Hugging Face", "run": "training run", "model": "GGUF", "adapter": "GGUF adapter"}
_MOST_LABELS = 20
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
        values = [
            {**asdict(entry), "path": str(entry.path), "bytes": library.disk_bytes(entry.path)} for entry in entries
        ]
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    rows = [
        (
            entry.name,
            _KINDS[entry.kind],
            amount(library.disk_bytes(entry.path), "bytes"),
            "built in" if entry.embedded else f"{datetime.fromtimestamp(entry.added):%Y-%m-%d %H:%M}",
            typed_path(entry.path),
        )
        for entry in entries
    ]
    for line in table(("name", "kind", "size", "changed", "path"), rows, right=2):
        click.echo(line)


@command.command("show", short_help="Show what MODEL is.")
@click.argument("model")
@_json_option
def show(model: str, as_json: bool) -> None:
    """Show what MODEL (a path or a name) is: sizes, types, fingerprint, template, and the adapters that fit."""
    description = library.describe(library.find_model(model))
    adapters = library.adapters_for(description.fingerprint) if description.kind in ("checkpoint", "model") else []
    if as_json:
        values: dict[str, Any] = asdict(description)
        values |= {
            **values.pop("sizes"),
            **values.pop("duty"),
            "path": str(description.path),
            "adapters": [str(path) for path in adapters],
        }
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    rows = [(title, value.replace("\n", "\\n")) for title, value in _rows(description) if value]
    if description.kind in ("checkpoint", "model"):
        rows.append(("adapters", "\n".join(map(typed_path, adapters)) or "none known for this base"))
    for line in aligned(rows, on_terminal=sys.stdout.isatty()):
        click.echo(line)


@command.command("pull", hidden=True)
@click.argument("model")
def pull(model: str) -> None:
    """Say where models come from; nothing is downloaded here."""
    raise UnsupportedError(
        f"edgetune works offline and does not download {model!r}.",
        hint="Fetch it with Hugging Face's own tool (hf download OWNER/MODEL), then give its directory.",
    )


@command.command("rm", short_help="Forget MODEL, or delete it.")
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


def _rows(description: library.Description) -> list[tuple[str, str]]:
    sizes = description.sizes
    layers = _number(sizes.layers)
    heads = f"{sizes.heads}" if sizes.heads else ""
    if sizes.heads and sizes.kv_heads and sizes.kv_heads != sizes.heads:
        heads += f" ({sizes.kv_heads} for keys and values)"
    return [
        ("name", description.name),
        ("kind", "PEFT adapter" if _is_from_elsewhere(description) else _KINDS[description.kind]),
        ("path", typed_path(description.path)),
        ("architecture", description.architecture),
        *_duty(description.duty),
        ("trained", description.trained),
        ("rank", _number(description.rank)),
        ("alpha", f"{description.alpha:g}" if description.alpha is not None else ""),
        ("targets", ", ".join(description.targets)),
        ("parameters", f"{description.parameters:,}"),
        ("layers", f"{sizes.layers} + {sizes.decoder_layers} in the decoder" if sizes.decoder_layers else layers),
        ("hidden size", _number(sizes.hidden_size)),
        ("feed-forward", _number(sizes.feed_forward_size)),
        ("experts", _experts(sizes)),
        ("heads", heads),
        ("head size", _number(sizes.head_size)),
        ("context", _number(sizes.context)),
        ("window", f"{sizes.window:,} tokens in {sizes.windowed_layers} layers" if sizes.window else ""),
        ("vocabulary", _number(sizes.vocabulary)),
        ("types", _types(description)),
        ("size", amount(description.bytes, "bytes")),
        ("in memory", _memory(description)),
        ("licence", description.licence),
        ("chat template", "yes" if description.has_template else "no"),
        ("base", description.base_name if description.kind in ("run", "adapter") else ""),
        ("fingerprint", _fingerprint(description.fingerprint)),
    ]


def _is_from_elsewhere(description: library.Description) -> bool:
    """Whether it is an adapter's directory in which no run left its record."""
    return description.kind == "run" and not (description.path / RUN_RECORD).is_file()


def _duty(duty: library.Duty) -> list[tuple[str, str]]:
    normalized = ", brought to length 1" if duty.normalize and duty.pooling else ""
    prompts = [
        f"{name}{' (default)' if name == duty.default_prompt else ''}: {text!r}" for name, text in duty.prompts.items()
    ]
    return [
        ("task", duty.task),
        ("labels", _labels(duty.labels)),
        ("pooling", duty.pooling + normalized),
        ("longest text", f"{duty.longest_text:,} tokens" if duty.longest_text else ""),
        ("prompts", "\n".join(prompts)),
    ]


def _labels(labels: Sequence[str]) -> str:
    """All of them where they are few, else the first ones and how many there are."""
    more = f" and {len(labels) - _MOST_LABELS:,} more" if len(labels) > _MOST_LABELS else ""
    return ", ".join(labels[:_MOST_LABELS]) + more


def _memory(description: library.Description) -> str:
    """What it takes with contexts of several lengths."""
    return ", ".join(f"{amount(size, 'bytes')} with {length:,} tokens" for length, size in description.memory.items())


def _experts(sizes: library.Sizes) -> str:
    if not sizes.experts:
        return ""
    used = f", {sizes.experts_used} for each token" if sizes.experts_used else ""
    return f"{sizes.experts}{used}" + (f"; feed-forward {sizes.expert_size:,} each" if sizes.expert_size else "")


def _types(description: library.Description) -> str:
    shares = ", ".join(
        f"{name} {_share(count / max(description.parameters, 1))}" for name, count in description.types.items()
    )
    return f"{description.file_type}: {shares}" if description.file_type else shares


def _share(share: float) -> str:
    """A type's part of the parameters; none is "0%" or hides another behind "100%"."""
    return "<1%" if share < 0.005 else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _fingerprint(fingerprint: Fingerprint) -> str:
    known = {part: value for part, value in asdict(fingerprint).items() if value}
    return ", ".join(f"{part} {value[:10]}" for part, value in known.items()) or "unknown (not made by edgetune)"


def _number(value: int | None) -> str:
    return f"{value:,}" if value is not None else ""
