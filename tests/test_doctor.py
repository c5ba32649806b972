"""`edgetune doctor` reports what is there, and still reports where something is broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgetune import hardware
from edgetune.cli.main import run


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}


def test_doctor_names_what_is_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_installed", lambda: False)
    assert run(["doctor", "--json"]) == 0
    found = findings(capsys)
    assert found["llama.cpp"]["ok"]
    assert found["embedded model"]["ok"]
    assert "torch" not in found


def test_a_broken_installation_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError("libllama.so is missing")

    monkeypatch.setattr(hardware, "torch_installed", lambda: False)
    monkeypatch.setattr("edgetune.engine.backends.list_devices", broken)
    assert run(["doctor", "--json"]) == 1
    assert not findings(capsys)["llama_cpp"]["ok"]
    assert run(["doctor"]) == 1
    assert "libllama.so is missing" in capsys.readouterr().out.replace("\n", " ")


def test_memory_and_cores_are_told() -> None:
    assert 0 < hardware.available_memory() <= hardware.total_memory()
    assert hardware.physical_cores() >= 1
