"""Every error has an exit code and one sentence, and the command line turns it into a message, never a traceback."""

from __future__ import annotations

import errno
from typing import Any, NoReturn

import click
import pytest

from edgetune import errors
from edgetune.cli import main as entry
from edgetune.errors import EdgetuneError, ExitCode

_CODES = {
    "CorruptFileError": 1,
    "UsageError": 2,
    "DataError": 2,
    "UnsupportedError": 3,
    "MismatchError": 3,
    "ParityError": 4,
    "ResourceError": 5,
    "InterruptedRun": 130,
}


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The exit code of a command that raises `error`."""

    @click.command()
    def command() -> NoReturn:
        raise error

    monkeypatch.setattr(entry.LazyGroup, "get_command", lambda *_: command)
    return entry.run(["doctor"])


@pytest.mark.parametrize("name", _CODES)
def test_exit_codes_are_the_contract(monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str) -> None:
    error = getattr(errors, name)("It broke.", hint="Mend it.")
    assert raising(monkeypatch, error) == _CODES[name]
    captured = capsys.readouterr()
    assert captured.err == "error: It broke.\nhint:  Mend it.\n"
    assert captured.out == ""


def test_the_tree_is_complete() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EdgetuneError)]
    assert {cls.__name__ for cls in classes} == {"EdgetuneError", *_CODES}
    assert int(EdgetuneError("x").exit_code) == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (MemoryError(), 5, "Out of memory"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (click.Abort(), 130, ""),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "/x"),
    ],
)
def test_other_errors_become_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: BaseException, code: int, said: str
) -> None:
    assert raising(monkeypatch, error) == code
    assert said in capsys.readouterr().err


def test_a_misspelt_verb_names_the_nearest(capsys: Any) -> None:
    assert entry.run(["conver"]) == ExitCode.USAGE
    assert "Did you mean 'convert'?" in capsys.readouterr().err


def test_an_unknown_flag_is_a_usage_error(capsys: Any) -> None:
    assert entry.run(["models", "list", "--nonsense"]) == ExitCode.USAGE
    assert "--nonsense" in capsys.readouterr().err
