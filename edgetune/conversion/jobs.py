"""What to make of what: a model, a run or nothing named → the file to write and all that is needed for it."""

from __future__ import annotations

import glob
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edgetune.errors import UsageError
from edgetune.events import Notice, Sink
from edgetune.export import (
    ADAPTER_OUTTYPES,
    ADAPTER_WEIGHTS,
    find_base_dir,
    load_run,
    model_name,
    require_trained_on,
    resolve_outtype,
)
from edgetune.library import classify, find_model
from edgetune.paths import check_replaceable, hidden_path
from edgetune.quantize import find_quant_type


@dataclass(frozen=True)
class Job:
    """What to make of what."""

    source: Path
    """A checkpoint, or a PEFT directory."""
    base_dir: Path
    """The checkpoint; of an adapter, the one it was trained on."""
    out_path: Path
    outtype: str
    quant: str | None = None
    merge: Path | None = None

    @property
    def is_adapter(self) -> bool:
        return self.source != self.base_dir

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter that torch has to run with, to compare."""
        return self.source if self.is_adapter else self.merge


def plan(
    source: str | None, output: Path | None, *, outtype: str, quant: str | None, merge: str | None, base: str | None
) -> Job:
    path = find_model(source) if source else _newest_run()
    kind = classify(path)
    if kind in ("model", "adapter"):
        raise UsageError(f"{path} is a GGUF file already.", hint=f"To quantize it: edgetune quantize {path} Q4_K_M")
    if path.is_file():
        raise UsageError(f"{path} is a file; convert takes a directory.", hint=f"Its own directory is {path.parent}.")
    if kind == "run":
        return _plan_adapter(path, output, outtype=outtype, quant=quant, merge=merge, base=base)
    merge_dir = _adapter_dir(merge) if merge else None
    if base is not None:
        raise UsageError("--base is for adapters; the source is a model itself.", hint="Leave --base away.")
    if quant and outtype != "auto":
        raise UsageError("-q and --outtype both name the output's type.", hint="Give one of them.")
    type_name = find_quant_type(quant).name if quant else resolve_outtype(path, outtype)
    name = model_name(path) + (f"-{merge_dir.resolve().name}" if merge_dir else "")
    out_path = _output(output, Path.cwd() / f"{name}-{type_name}.gguf")
    return Job(path, path, out_path, outtype, quant, merge_dir)


def _plan_adapter(
    path: Path, output: Path | None, *, outtype: str, quant: str | None, merge: str | None, base: str | None
) -> Job:
    base_dir = find_model(base) if base else find_base_dir(path)
    if classify(base_dir) not in ("checkpoint", "model"):
        raise UsageError(
            f"{base_dir} is not a Hugging Face model directory.", hint="Name the base's directory with --base."
        )
    if quant:
        raise UsageError(
            f"{path} is an adapter; adapters are not quantized like models.",
            hint="--outtype q8_0 makes it smaller. To quantize base and adapter in one: "
            f"edgetune convert {base_dir} --merge {path} -q {quant}",
        )
    if merge:
        raise UsageError(
            f"{path} is an adapter itself.", hint=f"Merge into its base: edgetune convert {base_dir} --merge {path}"
        )
    if outtype not in ADAPTER_OUTTYPES:
        raise UsageError(f"Adapters are not written as {outtype}.", hint=f"Use one of {', '.join(ADAPTER_OUTTYPES)}.")
    type_name = "F16" if outtype == "auto" else outtype.upper()
    return Job(path, base_dir, _output(output, path / f"adapter-{type_name}.gguf"), outtype)


def _adapter_dir(name: str) -> Path:
    path = find_model(name)
    if classify(path) != "run":
        raise UsageError(f"{path} is not an adapter directory.", hint="--merge takes a run or another PEFT directory.")
    return path


def plan_dequantized(
    given: tuple[str | None, Path | None],
    *,
    outtype: str,
    quant: str | None,
    merge: str | None,
    base: str | None,
    stack: ExitStack,
    sink: Sink,
) -> Job:
    """A checkpoint of the run in SOURCE merged into its 4-bit base; it lies beside the output until `stack` ends."""
    source, output = given
    path = find_model(source) if source else _newest_run()
    run = load_run(path) if classify(path) == "run" else None
    if run is None or merge:
        raise UsageError("--dequantized is for a QLoRA run.", hint="edgetune convert RUN --dequantized")
    base_dir = find_model(base) if base else find_base_dir(path)
    name = f"{model_name(base_dir)}-{path.resolve().name}"
    type_name = find_quant_type(quant).name if quant else "F16" if outtype == "auto" else outtype.upper()
    out_path = _output(output, Path.cwd() / f"{name}-{type_name}.gguf")
    place = hidden_path(out_path, "dequantized")
    stack.callback(shutil.rmtree, place, ignore_errors=True)
    require_trained_on(run, base_dir)
    from edgetune.training.dequantize import write_dequantized

    sink(Notice("Merging into the dequantized base…"))
    write_dequantized(run, base_dir, place / name)
    return Job(place / name, place / name, out_path, outtype, quant)


def _output(output: Path | None, default: Path) -> Path:
    path = default if output is None else output / default.name if output.is_dir() else output
    check_replaceable(path)
    return path


def _newest_run() -> Path:
    runs = Path("runs")
    found = {path: left for path in sorted(runs.glob("*/")) if (left := _trained_weights(path))}
    waiting = [path for path, left in found.items() if not _is_converted(path, left)]
    if not waiting:
        state = "Every run in ./runs is converted already" if found else "There is no finished run in ./runs"
        raise UsageError(f"{state}, and no SOURCE was given.", hint="Name a model or run: edgetune convert SOURCE")
    return max(waiting, key=lambda path: found[path].stat().st_mtime)


def _trained_weights(run_dir: Path) -> Path | None:
    """What the run left that a GGUF file can hold: an adapter, or a whole model (of which this is one file)."""
    if (adapter := run_dir / ADAPTER_WEIGHTS).is_file():
        config = json.loads((run_dir / "adapter_config.json").read_text(encoding="utf-8"))
        return adapter if config.get("peft_type") == "LORA" else None
    return next(iter(sorted(run_dir.glob("model*.safetensors"))), None)


def _is_converted(run_dir: Path, weights: Path) -> bool:
    trained = weights.stat().st_mtime
    made = [*run_dir.glob("*.gguf"), *Path.cwd().glob(f"{glob.escape(model_name(run_dir))}-*.gguf")]
    return any(path.stat().st_mtime >= trained for path in made)
