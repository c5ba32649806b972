"""Sequences kept on disk: the same as those made anew, found by content, and never believed when broken."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from mmap import mmap
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from filelock import FileLock

from edgetune.data import Split, Tokenized, load_tokenizer, read_dataset, tokenize
from edgetune.data import cache as module
from edgetune.data.cache import cached_tokenize
from edgetune.events import Event, Notice, Progress
from edgetune.paths import cache_dir
from edgetune.training.gguf_base.tokenizer import load_gguf_tokenizer
from tests.checkpoints import write_checkpoint
from tests.ggufs import base_gguf

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", "llama")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", 3)
    monkeypatch.setenv("EDGETUNE_HOME", str(tmp_path / "home"))


def write_rows(path: Path, count: int = 6, *, word: str = "fox") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": word * n}, {"role": "assistant", "content": "yes " * n * n}]}
        for n in range(1, count + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made(
    data: Path, base_dir: Path, *, max_length: int = 24, **changes: Any
) -> tuple[dict[str, Split[Tokenized]], list[Event]]:
    told: list[Event] = []
    dataset = read_dataset([data], has_template=True, splits=("train",))
    tokenizer = load_tokenizer(base_dir, **changes)
    return cached_tokenize(dataset, tokenizer, max_length=max_length, sink=told.append), told


def is_new(told: list[Event]) -> bool:
    return any(isinstance(event, Progress) for event in told)


def is_mapped(split: Split[Tokenized]) -> bool:
    array: Any = split.sequences[0].ids
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap)


def equal(one: Split[Tokenized], other: Split[Tokenized]) -> bool:
    assert one.summary() == other.summary()
    return all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.learned, b.learned)
        for a, b in zip(one.sequences, other.sequences, strict=True)
    )


def test_the_second_time_the_same_sequences_come_from_disk(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    first, told_first = made(data, base_dir)
    second, told_second = made(data, base_dir)
    assert is_new(told_first)
    assert not is_new(told_second)
    assert equal(first["train"], second["train"])
    for split in (first, second):  # what was just made is in the file as well, not in memory
        assert is_mapped(split["train"])
    assert [len(one.ids) for one in second["train"].sequences[-2:]] == [
        len(second["train"].sequences[n].ids) for n in (-2, -1)
    ]
    with pytest.raises(IndexError):
        second["train"].sequences[len(second["train"].sequences)]
    assert first["train"].truncated > 0
    # What was said of the data is said again.
    said = [[event for event in told if isinstance(event, Notice)] for told in (told_first, told_second)]
    assert said[0] == said[1] != []


def test_anything_else_is_tokenized_anew(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    made(data, base_dir)
    template = "{{ strftime_now('%d') }}{% for message in messages %}{{ message.content }}{% endfor %}"
    for changes in (
        {"max_length": 25},
        {"chat_template": template, "now": datetime(2026, 1, 1)},
        {"chat_template": template, "now": datetime(2026, 1, 2)},
    ):
        assert is_new(made(data, base_dir, **changes)[1])
        assert not is_new(made(data, base_dir, **changes)[1])
    write_rows(data, word="dog")
    assert is_new(made(data, base_dir)[1])


def test_a_broken_cache_is_made_again(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    made(data, base_dir)
    dataset = read_dataset([data], has_template=True, splits=("train",))
    expected = tokenize(dataset, load_tokenizer(base_dir), max_length=24)
    (kept,) = (cache_dir() / "tokens").iterdir()
    for name, content in (
        ("train.ids.npy", b"no array"),
        ("splits.json", b"{"),
        ("splits.json", b'{"counts": [], "notices": []}'),
        ("train.lengths.npy", b""),
    ):
        (kept / name).write_bytes(content)
        again, told = made(data, base_dir)
        assert is_new(told)
        assert equal(expected["train"], again["train"])
    np.save(kept / "train.lengths.npy", np.array([1, 2]))
    assert is_new(made(data, base_dir)[1])


def test_small_data_and_old_data_are_not_kept(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(write_rows(tmp_path / "train.jsonl", 2), base_dir)
    assert not (cache_dir() / "tokens").exists()
    monkeypatch.setattr(module, "KEPT", 2)
    for count in (3, 4, 5):
        made(write_rows(tmp_path / "train.jsonl", count), base_dir)
    kept = list((cache_dir() / "tokens").iterdir())
    assert len(kept) == 2
    sizes = [sum(file.stat().st_size for file in path.iterdir()) for path in kept]
    monkeypatch.setattr(module, "MOST_BYTES", max(sizes))
    data = write_rows(tmp_path / "train.jsonl", 6)
    made(data, base_dir)
    assert len(list((cache_dir() / "tokens").iterdir())) == 1
    assert not is_new(made(data, base_dir)[1])


def test_without_the_cache_the_same_sequences_are_made_and_nothing_is_kept(base_dir: Path, tmp_path: Path) -> None:
    from edgetune.training import TrainSettings, prepare

    data = write_rows(tmp_path / "train.jsonl")
    settings = TrainSettings(model=str(base_dir), data=(str(data),), eval=False)
    without = prepare(replace(settings, cache=False))
    assert not cache_dir().exists()
    kept, found = prepare(settings), prepare(settings)
    assert cache_dir().exists()
    assert equal(without.splits["train"], kept.splits["train"])
    assert equal(without.splits["train"], found.splits["train"])
    assert not replace(settings, cache=False).differences(settings)


def test_a_home_that_cannot_be_written_does_no_harm(base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    splits, told = made(write_rows(tmp_path / "train.jsonl"), base_dir)
    assert is_new(told)
    assert splits["train"].rows == 6


def test_rows_that_the_template_refuses_are_found_every_time(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    template = (
        "{% for message in messages %}{% if 'foxfox' in message.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ message.content }}{% endfor %}"
    )
    for _ in range(2):
        dataset = read_dataset([data], has_template=True, splits=("train",), skip_bad_rows=True)
        cached_tokenize(dataset, load_tokenizer(base_dir, chat_template=template), max_length=24)
        assert len(dataset.skipped.problems) == 5


def test_a_cache_that_can_only_be_read_is_read(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    made(data, base_dir)

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert not is_new(made(data, base_dir)[1])


def test_a_full_disk_costs_the_cache_alone(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
        without, _ = made(data, base_dir)
    assert not [*(cache_dir() / "tokens").glob("*")]
    assert not is_mapped(without["train"])
    kept, told = made(data, base_dir)
    assert is_new(told)
    assert equal(without["train"], kept["train"])


def test_whoever_wants_the_same_at_the_same_time_waits_for_it(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    made(data, base_dir)  # what is loaded late is loaded
    shutil.rmtree(cache_dir() / "tokens")
    with ThreadPoolExecutor(3) as workers:
        found = [*workers.map(lambda _: made(data, base_dir), range(3))]
    assert sorted(is_new(told) for _, told in found) == [False, False, True]
    assert all(equal(found[0][0]["train"], splits["train"]) for splits, _ in found[1:])


def test_waiting_is_told(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    made(data, base_dir)
    (kept,) = (cache_dir() / "tokens").iterdir()
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.0)
    told: Queue[Event] = Queue()
    dataset = read_dataset([data], has_template=True, splits=("train",))
    tokenizer = load_tokenizer(base_dir)
    with ThreadPoolExecutor(1) as worker:
        with FileLock(module._lock_path(kept)):
            waiting = worker.submit(cached_tokenize, dataset, tokenizer, max_length=24, sink=told.put)
            assert "Another process" in cast(Notice, told.get(timeout=60)).text
        assert waiting.result()["train"].rows == 6


def test_a_gguf_files_vocabulary_is_told_apart(base_dir: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl")
    dataset = read_dataset([data], has_template=True, splits=("train",))
    tokenizer = load_gguf_tokenizer(base_gguf("llama"))
    for expected in (True, False):
        told: list[Event] = []
        splits = cached_tokenize(dataset, tokenizer, max_length=24, sink=told.append)
        assert is_new(told) is expected
        assert splits["train"].rows == 6
    told = []
    cached_tokenize(dataset, load_tokenizer(base_dir), max_length=24, sink=told.append)
    assert is_new(told)
