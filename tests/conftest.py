"""Keeps the machine out of the tests: a home of their own, no network but loopback, no hub."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# What transformers draws while a test writes a model would stand in what the test reads from stderr.
os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side: thread pools that wait for each other take many times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# For two dozen small kernels, helpers that each import torch take longer than they save.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "EDGETUNE_HOME"):
        monkeypatch.setenv(name, str(home))


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def shared_data() -> Path:
    """Real models and datasets, where this checkout has them beside it; the test is skipped elsewhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no shared data beside this checkout")
    return SHARED_DATA
