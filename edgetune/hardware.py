"""What this machine has: cores, memory, disk, and the accelerators torch can use. Probes when asked, not at import."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil


@dataclass(frozen=True)
class TorchInfo:
    """What torch says of itself."""

    version: str
    device: str
    """The best device: "cuda", "mps" or "cpu"."""
    device_name: str
    bf16: bool
    """Whether that device multiplies matrices in bf16 in hardware."""


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    return max(1, min(cores, allowed))


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its container's limit."""
    return min(int(psutil.virtual_memory().total), _container_limit()[0])


def available_memory() -> int:
    """Bytes of memory that can still be taken without swapping."""
    limit, used = _container_limit()
    return max(0, min(int(psutil.virtual_memory().available), limit - used))


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or will hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def torch_installed() -> bool:
    """Whether torch can be imported, without importing it."""
    try:
        return find_spec("torch") is not None
    except (ImportError, ValueError):
        return False


def torch_info() -> TorchInfo | None:
    """What torch can use here; None when it is not installed. Imports torch, which takes seconds."""
    try:
        import torch
    except ImportError:
        return None
    if torch.cuda.is_available():
        name, bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
        return TorchInfo(torch.__version__, "cuda", name, bool(bf16))
    if torch.backends.mps.is_available():
        return TorchInfo(torch.__version__, "mps", "Apple GPU", bool(torch.backends.mps.is_macos_or_newer(14, 0)))
    return TorchInfo(torch.__version__, "cpu", f"{physical_cores()} cores", _cpu_has_bf16())


def _cpu_has_bf16() -> bool:
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _container_limit() -> tuple[int, int]:
    """The memory limit of this control group and what of it is used, in bytes; no limit is a very large one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return int(Path(limit).read_text()), int(Path(used).read_text())
        except (OSError, ValueError):
            continue
    return 1 << 62, 0
