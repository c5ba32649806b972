"""Which device and number type a run computes in. Chooses by itself what the machine has; a flag overrides it."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import psutil

from edgetune.errors import UsageError
from edgetune.hardware import available_memory, physical_cores, total_memory
from edgetune.paths import bytes_text
from edgetune.training.processes import local_index, local_size

if TYPE_CHECKING:
    import torch


def choose_device(wanted: str) -> torch.device:
    """`wanted`, or for "auto" the best device here. Raises `UsageError` when `wanted` is not here."""
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, available in here.items() if available)
    if not here[wanted]:
        available = ", ".join(name for name, is_here in here.items() if is_here)
        raise UsageError(f"This machine has no {wanted} device that torch can use.", hint=f"Available: {available}.")
    if wanted == "cuda" and (index := local_index()):
        if index >= torch.cuda.device_count():
            raise UsageError(
                f"There are more processes on this machine than its {torch.cuda.device_count()} GPUs.",
                hint="Start one for each GPU: torchrun --nproc-per-node gpu.",
            )
        return torch.device("cuda", index)
    return torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The base weights' type: `wanted`, or for "auto" bf16 where the device computes in it."""
    import torch

    if wanted == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies matrices in bf16 in hardware."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def describe_machine(device: torch.device, dtype: torch.dtype, *, processes: int) -> dict[str, str]:
    """What a run computes on, for its report."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "computed in": str(dtype).removeprefix("torch."),
        "cores": f"{physical_cores()}, {torch.get_num_threads()} threads",
        "memory": bytes_text(torch.cuda.mem_get_info(device)[1] if on_gpu else total_memory()),
        "processes": str(processes),
        "system": platform.platform(terse=True),
    }


def memory_bytes(device: torch.device) -> int:
    """Memory in use: the device's own at its highest, or the process's for the CPU."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return int(psutil.Process().memory_info().rss)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that a run could still take."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory() // local_size()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory did not suffice; torch has several ways to say so."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


_NO_MEMORY = ("out of memory", "can't allocate memory")


def release_memory(device: torch.device) -> None:
    """Hand memory that torch, or malloc on Linux, keeps for later back to the device."""
    import torch

    if device.type == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""malloc.h's numbers for them; their most is what glibc comes to by itself."""


@contextmanager
def sparing_heap() -> Iterator[None]:
    """Have malloc on Linux give large tensors pages of their own, which are handed back once they are freed.

    For loading, where large numbers come and go between small ones that stay: in one heap these keep the holes, which
    are gigabytes, from closing. Afterwards malloc is as it is once it has freed something large: it keeps what comes
    and goes with every step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt if sys.platform == "linux" else None
    except AttributeError:
        mallopt = None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        ctypes.CDLL(None).malloc_trim(0)


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Where the random numbers of a step stand: the process's, and the device's own if it has some."""
    import torch

    own = torch.get_rng_state()
    return (own, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (own,)


def restore_random_state(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    """Go on from where `random_state` was."""
    import torch

    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
