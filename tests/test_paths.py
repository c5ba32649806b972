"""Files appear whole or not at all, wherever the writing stops; homes follow the environment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgetune.errors import ResourceError, UsageError
from edgetune.paths import (
    bytes_text,
    cache_dir,
    check_disk_space,
    check_replaceable,
    hidden_path,
    home_dir,
    whole_dir,
    whole_file,
    write_json,
)


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail_while_writing(path: Path, error: BaseException) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(b"half")
        raise error


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with whole_file(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_bytes() == b"half"
    assert left_over(path.parent) == ["file.bin"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.bin"
    link.symlink_to(tmp_path / "elsewhere" / "file.bin")
    with whole_file(link) as partial:
        partial.write_bytes(b"new")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "file.bin").read_bytes() == b"new"
    assert left_over(tmp_path / "elsewhere") == ["file.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(pipe) as partial:
        partial.write_bytes(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    with pytest.raises(UsageError, match=r"pipe is a device or a pipe"):
        check_replaceable(pipe)
    assert pipe.is_fifo()
    assert left_over(tmp_path) == ["pipe"]


def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        fail_while_writing(path, RuntimeError())
    assert path.read_bytes() == b"old"
    assert left_over(tmp_path) == ["file.bin"]


def test_an_interrupt_leaves_no_rest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_while_writing(tmp_path / "file.bin", KeyboardInterrupt())
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(tmp_path: Path, number: int) -> None:
    with pytest.raises(ResourceError, match="disk is full") as caught:
        fail_while_writing(tmp_path / "file.bin", OSError(number, os.strerror(number)))
    assert caught.value.hint
    assert left_over(tmp_path) == []


def test_other_os_errors_stay_themselves(tmp_path: Path) -> None:
    with pytest.raises(PermissionError):
        fail_while_writing(tmp_path / "file.bin", PermissionError(errno.EACCES, "no"))


def test_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10, used=5, free=5))
    check_disk_space(tmp_path, 5)
    with pytest.raises(ResourceError, match=r"5 B free, 6 B are needed"), whole_file(tmp_path / "f", expected_bytes=6):
        raise AssertionError("must not get here")


def test_a_directory_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").write_text("")
    with whole_dir(path) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "new").write_text("x")
    assert left_over(path) == ["sub"]
    assert left_over(tmp_path) == ["run"]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / "old").write_text("")

    def fail() -> None:
        with whole_dir(path) as partial:
            (partial / "new").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert left_over(path) == ["old"]
    assert left_over(tmp_path) == ["run"]


def test_json_is_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))
    assert home_dir() == tmp_path / "home"
    assert cache_dir() == tmp_path / "home" / "cache"
    assert not home_dir().exists()
    monkeypatch.delenv("EDGETUNE_HOME")
    assert home_dir().name == "edgetune"


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    mine = hidden_path(tmp_path / "a.bin", "partial").name
    left = tmp_path / mine.replace(str(os.getpid()), str(dead_process()))
    left.write_bytes(b"half")
    (left.with_name(f"{left.name}.full")).write_bytes(b"half")
    left.with_name(left.name.replace("a.bin", "run")).mkdir()
    with whole_file(tmp_path / "b.bin") as partial:
        partial.write_bytes(b"whole")
    assert left_over(tmp_path) == ["b.bin"]


def test_what_others_are_writing_and_the_last_copy_stay(tmp_path: Path) -> None:
    mine = hidden_path(tmp_path / "a.bin", "partial").name
    kept = [
        mine.replace(str(os.getpid()), str(os.getppid())),
        mine.replace(f"-{os.getpid()}.", f"elsewhere-{dead_process()}."),
        mine.replace(str(os.getpid()), str(dead_process())).replace("partial", "old"),
        ".hidden.partial",
    ]
    for name in kept:
        (tmp_path / name).write_bytes(b"")
    with whole_file(tmp_path / "b.bin") as partial:
        partial.write_bytes(b"")
    assert left_over(tmp_path) == sorted([*kept, "b.bin"])


def test_hidden_names_do_not_grow(tmp_path: Path) -> None:
    once = hidden_path(tmp_path / "a.gguf", "unproven.gguf")
    assert hidden_path(once, "partial").name == f"{once.name}.partial"


def test_where_nothing_can_be_written_the_name_asked_for_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hidden = hidden_path(tmp_path / "file" / "a.gguf", "unproven.gguf")
    with pytest.raises(UsageError, match=r"file/a\.gguf cannot be written: ") as caught, whole_file(hidden):
        raise AssertionError("must not get here")
    assert "unproven" not in caught.value.message


def test_only_gguf_files_are_replaced_by_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345678")
    with pytest.raises(UsageError, match="no GGUF"):
        check_replaceable(tmp_path / "a.safetensors")
    for name, content in (("a.gguf", b"anything"), ("b.bin", b"GGUF..."), ("c.bin", b"")):
        (tmp_path / name).write_bytes(content)
        check_replaceable(tmp_path / name)
    check_replaceable(tmp_path / "none")


def test_json_takes_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "a.json", {"path": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": name}


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (3e9, "3.0 GB")])
def test_bytes_for_people(count: float, text: str) -> None:
    assert bytes_text(count) == text
