"""Runs llama.cpp's quantizer in a child process, checks before and after, and turns its log into events and errors.

llama.cpp tells tensor names and sizes through its log alone, so the log's lines are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edgetune.artifacts import Gguf
from edgetune.errors import CorruptFileError, EdgetuneError, ResourceError, UnsupportedError, UsageError
from edgetune.events import Notice, Progress, Sink, ignore
from edgetune.gguf_header import GgufHeader, gguf_from_header, read_gguf, read_gguf_header
from edgetune.paths import whole_file
from edgetune.quantize.quant_types import QuantType, find_quant_type

_WARN, _ERROR = 2, 3
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] (\S+) +- \[([^\]]*)\], type = +(\S+),")
_CONVERTING = re.compile(r"converting to (\S+)")
_DONE = re.compile(r"size = +[\d.]+ MiB")
_PLANNED = re.compile(r"quant size += +([\d.]+) MiB")
_FAILED = re.compile(r"failed to quantize: (.*)", re.DOTALL)
_FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")


def quantize(
    in_path: Path,
    out_path: Path,
    quant_type: str,
    *,
    sink: Sink = ignore,
    threads: int = 0,
    allow_requantize: bool = False,
) -> Gguf:
    """Write `in_path` as `quant_type` to `out_path`, whole or not at all.

    `threads` 0 uses every core. Raises `UsageError` for an unknown type or an already quantized input (unless
    `allow_requantize`), `UnsupportedError` for a type that needs an importance matrix or an adapter as input,
    `CorruptFileError` for a broken input, `ResourceError` when the disk does not hold the output.
    """
    kind = find_quant_type(quant_type)
    header = read_gguf_header(in_path)
    _check_input(header, kind, in_path, out_path, allow_requantize=allow_requantize)
    request = {
        "in": str(in_path),
        "out": "",
        "ftype": kind.ftype,
        "threads": threads,
        "dry_run": True,
        "only_copy": kind.only_copy,
        "allow_requantize": allow_requantize,
    }
    plan = _run(request, _Log(header, ignore, kind))
    if plan.needs_imatrix:
        raise _needs_imatrix(kind)
    expected = int(plan.planned_bytes) + header.data_start
    with whole_file(out_path, expected_bytes=expected) as partial:
        done = _run({**request, "out": str(partial), "dry_run": False}, _Log(header, sink, kind))
        _check_output(partial, out_path, expected)
    if done.fallback:
        sink(Notice(f"{done.fallback} tensors have rows that do not fit {kind.name}; llama.cpp chose a larger type."))
    return read_gguf(out_path)


def _check_input(header: GgufHeader, kind: QuantType, in_path: Path, out_path: Path, *, allow_requantize: bool) -> None:
    if gguf_from_header(header).kind == "adapter":
        raise UnsupportedError(
            f"{in_path} is an adapter, which llama.cpp's quantizer does not take.",
            hint="Adapters are small; `edgetune convert RUN --outtype q8_0` makes the smallest one.",
        )
    if in_path.resolve() == out_path.resolve():
        raise UsageError(f"{out_path} is the input itself.", hint="Name another output file.")
    quantized = sorted({tensor.type for tensor in header.tensors} - {"F32", "F16", "BF16", "F64", "I32", "I64"})
    if quantized and not kind.only_copy and not allow_requantize:
        raise UsageError(
            f"{in_path} is quantized already ({', '.join(quantized)}); quantizing it again would add to its loss.",
            hint="Start from the F16, BF16 or F32 file, or accept the loss with --allow-requantize.",
        )
    if kind.needs_imatrix:
        raise _needs_imatrix(kind)


def _needs_imatrix(kind: QuantType) -> UnsupportedError:
    return UnsupportedError(
        f"{kind.name} needs an importance matrix: without one its few bits make garbage, and llama.cpp refuses.",
        hint="Q4_K_M, IQ4_XS, Q3_K_M and Q2_K need none.",
    )


def _check_output(partial: Path, out_path: Path, expected: int) -> None:
    # llama.cpp does not notice a write that fails: its stream sets a bit that nobody reads.
    try:
        read_gguf_header(partial)
    except CorruptFileError as error:
        free = shutil.disk_usage(partial.parent).free
        written = partial.stat().st_size if partial.exists() else 0
        if written < expected and free < expected - written:
            raise ResourceError(
                f"The disk is full: {out_path} was not written.", hint="Free some space, or write elsewhere with -o."
            ) from error
        raise EdgetuneError(f"llama.cpp wrote a file that is not whole: {error.message}") from error


@dataclass
class _Log:
    """Reads llama.cpp's log as it comes, sends progress, and keeps what matters at the end."""

    header: GgufHeader
    sink: Sink
    kind: QuantType
    planned_bytes: float = 0.0
    needs_imatrix: bool = False
    fallback: int = 0
    failure: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    _done: int = 0
    _size: int = 0
    _label: str = ""

    def __post_init__(self) -> None:
        self._sizes = {tensor.name: tensor.nbytes for tensor in self.header.tensors}
        self._total = sum(self._sizes.values())

    def read(self, level: int, text: str) -> None:
        """Take in one message."""
        if match := _TENSOR.search(text):
            name, shape, tensor_type = match.group(3), re.sub(r"\s*,\s*", " × ", match.group(4).strip()), match.group(5)
            self._size = self._sizes.get(name, 0)
            self._label = f"{name} [{re.sub(r'( × 1)+$', '', shape)}] {tensor_type}"
            self._send()
        if match := _CONVERTING.search(text):
            self._label += f" → {match.group(1)}"
            self._send()
        if _DONE.search(text):
            self._done, self._size = self._done + self._size, 0
            self._send()
        self._read_summary(level, text)

    def _read_summary(self, level: int, text: str) -> None:
        if match := _PLANNED.search(text):
            self.planned_bytes = float(match.group(1)) * 2**20
        if match := _FALLBACK.search(text):
            self.fallback = int(match.group(1))
        if match := _FAILED.search(text):
            self.failure = match.group(1).strip()
        if level == _WARN and "will require an imatrix" in text:
            self.needs_imatrix = True
        if level >= _ERROR and text.strip():
            self.tail.append(text.strip())

    def _send(self) -> None:
        self.sink(Progress("quantize", self._done, self._total, "bytes", self._label))


def _run(request: Mapping[str, object], log: _Log) -> _Log:
    with _child(request) as child:
        for line in child.stdout or ():
            try:
                level, text = json.loads(line)
            except ValueError:
                log.tail.append(line.strip())  # Not from the log: an abort's last words, a traceback.
                continue
            log.read(level, text)
        code = child.wait()
    if code != 0:
        raise _failure(request, log, code)
    return log


def _failure(request: Mapping[str, object], log: _Log, code: int) -> EdgetuneError:
    reason = log.failure or next((line for line in reversed(log.tail) if line), "no reason given")
    reason = " ".join(reason.split()).rstrip(".")
    if code == -signal.SIGKILL:
        return ResourceError(
            f"The system stopped llama.cpp while it quantized {request['in']}: most likely memory ran out.",
            hint="Close other programs, or use fewer --threads.",
        )
    if code < 0:
        return EdgetuneError(f"llama.cpp crashed (signal {-code}) while quantizing {request['in']}: {reason}.")
    if "unknown model architecture" in reason:
        return UnsupportedError(f"llama.cpp cannot quantize {request['in']}: {reason}.")
    return EdgetuneError(f"llama.cpp could not quantize {request['in']}: {reason}.")


@contextmanager
def _child(request: Mapping[str, object]) -> Iterator[subprocess.Popen[str]]:
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        [sys.executable, "-m", "edgetune.quantize.worker", json.dumps(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"},
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
