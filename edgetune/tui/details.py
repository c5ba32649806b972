"""What is to be known of a model, an adapter or a run on this machine, read from its headers and records."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edgetune.artifacts import RUN_RECORD, Run
from edgetune.errors import EdgetuneError
from edgetune.library import Entry, checkpoint_architecture, describe, disk_bytes
from edgetune.paths import bytes_text
from edgetune.tui.palette import Palette
from edgetune.tui.stage_view import curve
from edgetune.tui.stages import purpose
from edgetune.tui.visible import one_line, visible

_METRICS = "metrics.jsonl"
_CURVE_ROWS = 5
_FIRST_STEPS = [
    ("try", "c to chat; t to train an adapter on the support tickets that come with it."),
    ("then", "What is trained, converted or quantized is listed here, to chat with."),
]


def details(entry: Entry, *, palette: Palette, width: int) -> RenderableType:
    """What is to be known of `entry`; reads its headers and records, so not for the thread that draws."""
    head = Text(one_line(entry.name), palette.ink("primary", bold=True))
    try:
        rows, more = _about_run(entry, palette, width) if entry.kind == "run" else (_about_model(entry), [])
    except (EdgetuneError, OSError) as error:
        return Group(head, Text(visible(str(error)), palette.ink("error")))
    if (use := purpose(entry)) != "chat":
        rows.insert(1, ("made for", f"edgetune {use}"))
    rows.append(("path", str(entry.path)))
    if entry.embedded:
        rows += _FIRST_STEPS
    else:
        rows.append(("changed", f"{datetime.fromtimestamp(entry.added):%Y-%m-%d %H:%M}"))
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(Text(name, palette.muted), Text(visible(value)))
    return Group(head, table, *more)


def _about_model(entry: Entry) -> list[tuple[str, str]]:
    # Describing a checkpoint in full would hash its weights, which takes a while the first time.
    if entry.kind == "checkpoint":
        kind = "comes with edgetune" if entry.embedded else "Hugging Face directory"
        return [
            ("kind", kind),
            ("architecture", checkpoint_architecture(entry.path)),
            ("size", bytes_text(disk_bytes(entry.path))),
        ]
    about = describe(entry.path)
    adapts = f"rank {about.rank}, {', '.join(about.targets)}" if about.rank else ""
    return [
        ("kind", "GGUF adapter" if entry.kind == "adapter" else "GGUF model"),
        ("architecture", about.architecture),
        ("type", about.file_type),
        ("parameters", f"{about.parameters:,}"),
        ("size", bytes_text(about.bytes)),
        ("context", f"{about.sizes.context:,} tokens" if about.sizes.context else ""),
        ("base", about.base_name),
        ("adapts", adapts),
        ("trained", about.trained),
    ]


def _about_run(entry: Entry, palette: Palette, width: int) -> tuple[list[tuple[str, str]], list[RenderableType]]:
    if not (entry.path / RUN_RECORD).is_file():
        return [("kind", "PEFT adapter, trained elsewhere")], []
    run = Run.load(entry.path)
    train, valid = read_losses(entry.path)
    metrics = run.metrics
    state = "finished" if run.finished else f"stopped or at work, at step {len(train)}"
    rows = [
        ("kind", f"run, {state}"),
        ("base", run.base_name),
        ("data", ", ".join(Path(str(path)).name for path in run.data.get("paths", []))),
        ("steps", f"{metrics['step']:,}" if "step" in metrics else ""),
        ("loss", f"{train[0]:.4f} → {train[-1]:.4f}" if train else ""),
        ("validation", f"{valid[0]:.4f} → {valid[-1]:.4f}" if len(valid) > 1 else ""),
        ("report", str(report) if (report := entry.path / "report.html").is_file() else ""),
        ("GGUF", ", ".join(sorted(path.name for path in entry.path.glob("*.gguf"))) or "not converted yet"),
    ]
    return rows, curve(train, palette, width=width, rows=_CURVE_ROWS) if len(train) > 1 else []


def read_losses(run_dir: Path) -> tuple[list[float], list[float]]:
    """The training and validation losses that a run has written so far; a cut last line is not one yet."""
    losses: dict[str, list[float]] = {"train": [], "valid": []}
    try:
        lines = (run_dir / _METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            values = json.loads(line)
            losses[values["split"]].append(float(values["loss"]))
        except (ValueError, KeyError, TypeError):
            continue
    return losses["train"], losses["valid"]
