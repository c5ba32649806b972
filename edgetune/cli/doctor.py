"""`edgetune doctor`: what works on this machine, with a hint for everything that does not."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from edgetune import __version__, hardware, library
from edgetune.cli.progress import amount, say
from edgetune.errors import EdgetuneError, ExitCode
from edgetune.paths import home_dir

_NEEDED = ("gguf", "jinja2", "llama-cpp-python", "numpy", "rich", "sentencepiece", "tokenizers")
_TRAINING = ("torch", "transformers", "peft", "accelerate", "safetensors", "pyarrow")
_LOW_MEMORY, _LOW_DISK = 1 << 30, 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    value: str
    hint: str = ""
    essential: bool = True
    """Whether nothing works without it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Show what works on this machine; importing torch takes a few seconds.

    Exits with 1 when something essential is broken. Training is not essential: chat and conversion do without torch.
    """
    if not as_json and hardware.torch_installed():
        say("Looking around; torch takes a few seconds to load.")
    findings = [finding for check in _CHECKS for finding in _guarded(check)]
    broken = any(not finding.ok and finding.essential for finding in findings)
    if as_json:
        values = {"ok": not broken, "version": __version__, "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    return ExitCode.FAILED if broken else ExitCode.OK


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        mark = "[green]✔[/]" if finding.ok else "[red]✘[/]" if finding.essential else "[yellow]![/]"
        value = escape(finding.value) + (f"\n[dim]{escape(finding.hint)}[/]" if finding.hint else "")
        table.add_row(mark, finding.name, value)
    Console().print(table)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is a finding itself: the report must come out just where something is wrong."""
    try:
        yield from check()
    except (EdgetuneError, ImportError, OSError, RuntimeError, AttributeError) as error:
        yield Finding(check.__name__.strip("_"), False, str(error) or type(error).__name__, getattr(error, "hint", ""))


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 10)
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", ok, value, "" if ok else "edgetune needs Python 3.10 or newer.")
    yield Finding("edgetune", True, __version__)


def _packages() -> Iterator[Finding]:
    for names, title, essential, extra in (
        (_NEEDED, "packages", True, "edgetune"),
        (_TRAINING, "for training", False, '"edgetune[train]"'),
    ):
        found = {name: _version(name) for name in names}
        missing = [name for name, version in found.items() if not version]
        value = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        if missing:
            value = f"missing: {', '.join(missing)}" + (f"; found: {value}" if value else "")
        yield Finding(title, not missing, value, f"pip install {extra}" if missing else "", essential)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _llama_cpp() -> Iterator[Finding]:
    from edgetune.engine.backends import list_devices, system_info

    devices = list_devices()
    gpus = [device for device in devices if device.kind != "cpu"]
    yield Finding("llama.cpp", bool(devices), f"built for {_features(system_info())}" if devices else "finds no device")
    for device in devices:
        memory = f", {amount(device.free_bytes, 'bytes')} free" if device.free_bytes else ""
        yield Finding("device", True, f"{device.name}: {device.description} ({device.kind}){memory}")
    if not gpus:
        hint = "For a GPU, build llama-cpp-python with its backend: CMAKE_ARGS=-DGGML_CUDA=on (or Metal, Vulkan)."
        yield Finding("GPU", False, "this build of llama.cpp finds none; models run on the CPU", hint, essential=False)


def _features(system_info: str) -> str:
    """What llama.cpp's own line ("CPU : AVX = 1 | FMA = 0 |") has switched on."""
    pairs = (part.rpartition(":")[2].partition("=") for part in system_info.split("|"))
    return ", ".join(name.strip() for name, _, value in pairs if value.strip() not in ("", "0")) or "the plainest CPU"


def _torch() -> Iterator[Finding]:
    if not hardware.torch_installed():
        return
    info = hardware.torch_info()
    if info is None:
        yield Finding("torch", False, "is installed but cannot be imported", 'pip install "edgetune[train]"', False)
        return
    yield Finding("torch", True, f"{info.version} on {info.device} ({info.device_name})", essential=False)
    slow = "" if info.bf16 else "Training works, in f32: slower, and with twice the memory for the base."
    yield Finding("bf16", info.bf16, "in hardware" if info.bf16 else "not in hardware", slow, essential=False)


def _machine() -> Iterator[Finding]:
    free, total = hardware.available_memory(), hardware.total_memory()
    low = free < _LOW_MEMORY
    value = f"{amount(free, 'bytes')} of {amount(total, 'bytes')} free"
    yield Finding(
        "memory", not low, value, "Close other programs, or use small models." if low else "", essential=False
    )
    yield Finding("CPU", True, f"{hardware.physical_cores()} physical cores")
    disk = hardware.free_disk(home_dir())
    hint = "" if disk >= _LOW_DISK else "Free some space before converting."
    yield Finding("disk", disk >= _LOW_DISK, f"{amount(disk, 'bytes')} free at {home_dir()}", hint, essential=False)


def _library() -> Iterator[Finding]:
    entries = library.list_models()
    known = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    yield Finding("library", True, f"{known} (`edgetune models` lists them), kept in {home_dir()}")
    if not _writable(home_dir()):
        hint = "Set EDGETUNE_HOME to a directory you can write to."
        yield Finding("library", False, f"{home_dir()} cannot be written", hint, essential=False)


def _writable(path: Path) -> bool:
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK)


def _embedded_model() -> Iterator[Finding]:
    description = library.describe(library.embedded_model_dir())
    value = f"{description.name}, {description.parameters:,} parameters, at {description.path}"
    yield Finding("embedded model", True, value)


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python, _packages, _llama_cpp, _torch, _machine, _library, _embedded_model,
)  # fmt: skip
