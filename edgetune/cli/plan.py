"""`edgetune plan`: what training a model would take here, and settings that fit. Parses, asks, renders."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from edgetune.cli.progress import amount, say, show_progress
from edgetune.training.settings import TrainSettings, flag_name, merge_settings

if TYPE_CHECKING:
    from edgetune.training.forecast import Forecast

_PROPOSED = ("max_length", "batch_size", "grad_accum")


@click.command("plan", short_help="Say what training would take here.")
@click.option(
    "-m", "--model", required=True, metavar="MODEL", help="Base model: a directory, or a name in the library."
)
@click.option("--method", metavar="NAME", help="How to adapt it; by default LoRA, or QLoRA where that alone fits.")
@click.option("--max-length", type=int, help="Longest sequence; by default the plan proposes one.")
@click.option("--rank", type=int, help="LoRA rank r.")
@click.option("--target-modules", multiple=True, metavar="NAMES", help="Modules to adapt.")
@click.option("--dtype", type=click.Choice(get_args(get_type_hints(TrainSettings)["dtype"])), help="Type of the base.")
@click.option("--device", type=click.Choice(get_args(get_type_hints(TrainSettings)["device"])), help="Where to train.")
@click.option("--probe/--no-probe", default=True, show_default=True, help="Train for 20 seconds to learn the speed.")
@click.option("--json", "as_json", is_flag=True, help="Write the plan to stdout as JSON.")
def command(probe: bool, as_json: bool, **options: Any) -> None:
    """Say how much memory training MODEL takes by length of its rows, and propose settings that fit this machine.

    Memory comes from the model's config alone; the speed from training on random tokens for 20 seconds. Sequences are
    packed into rows, so that the batch size costs no memory.

    \b
    edgetune plan -m pocket
    edgetune plan -m models/Qwen2.5-0.5B --max-length 4096 --no-probe
    """
    given = {name: value for name, value in options.items() if value not in (None, ())}
    from edgetune.training.forecast import fitting_forecast, forecast
    from edgetune.training.forecast import probe as measure

    settings = merge_settings(given, {})
    found = forecast(settings) if "method" in given else fitting_forecast(settings)
    speed = None
    if probe and found.proposal is not None:
        with show_progress() as sink:
            speed = measure(found.proposal, sink=sink)
    if as_json:
        click.echo(json.dumps(_record(found, speed), ensure_ascii=False))
        return
    _show(found, speed)


def _record(found: Forecast, speed: float | None) -> dict[str, Any]:
    cases = [
        {
            "max_length": case.length,
            "grad_checkpointing": case.grad_checkpointing,
            "memory_bytes": case.memory.total,
            "memory": asdict(case.memory),
            "fits": case.fits,
        }
        for case in found.cases
    ]
    proposal = found.proposal and {
        **{name: getattr(found.proposal, name) for name in _PROPOSED},
        "grad_checkpointing": found.proposal.grad_checkpointing == "on",
    }
    return {
        "model": str(found.model_dir),
        "device": found.device,
        "dtype": found.dtype,
        "method": found.method,
        "trainable_parameters": found.trainable_parameters,
        "all_parameters": found.all_parameters,
        "free_memory_bytes": found.free_bytes,
        "cases": cases,
        "proposal": proposal,
        "command": _train_command(found),
        "tokens_per_second": speed,
    }


def _show(found: Forecast, speed: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("tokens in a row", "memory", "with --grad-checkpointing"):
        table.add_column(name, justify="right")
    for plain, lean in zip(found.cases[::2], found.cases[1::2], strict=True):
        cells = [amount(case.memory.total, "bytes") + ("" if case.fits else " (too much)") for case in (plain, lean)]
        table.add_row(f"{plain.length:,}", *cells)
    Console(stderr=True).print(table)
    trained, every = found.trainable_parameters, found.all_parameters
    free = amount(found.free_bytes, "bytes")
    say(f"{trained:,} of {every:,} parameters are trained, on {found.device} in {found.dtype}; {free} are free.")
    if found.method == "qlora":
        say("The base is held in 4 bits (QLoRA).")
    if found.proposal is None:
        say("None of it fits. A smaller model, or the same one quantized (a GGUF file with -m), takes less.")
        return
    if speed == 0:
        say("Memory did not suffice after all: close other programs, or give a smaller --max-length.")
    elif speed:
        say(f"About {speed:,.0f} tokens/s.")
    click.echo(_train_command(found))


def _train_command(found: Forecast) -> str:
    """The command that trains as proposed, but for the data."""
    if found.proposal is None:
        return ""
    default, parts = TrainSettings(), ["edgetune", "train", "-m", found.proposal.model, "-d", "DATA"]
    for name in ("method", "max_length", "batch_size", "rank", "dtype", "device", "grad_checkpointing"):
        value = getattr(found.proposal, name)
        if value != getattr(default, name):
            parts += [flag_name(name), str(value)]
    for name in found.proposal.target_modules if found.proposal.target_modules != default.target_modules else ():
        parts += [flag_name("target_modules"), name]
    return shlex.join(parts)
