"""What a command that must fail tells."""

from __future__ import annotations

import pytest

from edgetune.cli.main import run


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *, hint: bool = True) -> tuple[int, str]:
    """Exit code and message of a command that must fail in one sentence, with nothing on stdout."""
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert len(errors) == 1, captured.err
    assert ("hint:  " in captured.err) or not hint, captured.err
    return code, errors[0]
