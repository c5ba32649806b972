"""Batches of texts computed side by side: the same vectors in the same order, and nobody's cores kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edgetune.engine import open_encoder, workers
from edgetune.engine.encoder import Encoder
from edgetune.engine.torch.encoder import load_backend
from edgetune.export import export_base
from tests.encoders import LABELS, furthest, write_encoder

TEXTS = [f"{'the quick brown fox played ' * (number % 9)}hello {number}" for number in range(300)]
PAIRS = [(text, "a cafe") for text in TEXTS[:40]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(
        tmp_path_factory.mktemp("workers") / "bert", "bert", "ForSequenceClassification", overrides=LABELS
    )


@pytest.fixture(scope="module")
def gguf(checkpoint: Path) -> Path:
    export_base(checkpoint, checkpoint.parent / "bert.gguf", outtype="f32")
    return checkpoint.parent / "bert.gguf"


def answers(encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    with encoder:
        vectors = encoder.embed(TEXTS)
        return vectors, np.array([list(one.scores.values()) for one in encoder.classify([*TEXTS, *PAIRS])])


def test_workers_give_what_one_gives(checkpoint: Path, gguf: Path) -> None:
    import torch

    before = torch.get_num_threads()
    expected = answers(open_encoder(gguf, threads=1))
    try:
        for encoder in (open_encoder(gguf, threads=3), open_encoder(checkpoint, dtype="f32", threads=3)):
            vectors, scores = answers(encoder)
            assert furthest(expected[0], vectors) < 1e-6
            assert np.abs(expected[1] - scores).max() < 2e-3
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_hundreds_of_short_texts_take_several_batches(gguf: Path, threads: int) -> None:
    with open_encoder(gguf, threads=threads) as encoder:
        found = encoder.embed(["the"] * 500)
        assert furthest(found, np.repeat(encoder.embed(["the"]), 500, axis=0)) < 1e-5


def test_callers_on_several_threads_share_a_model(gguf: Path) -> None:
    with open_encoder(gguf, threads=2) as encoder:
        expected = encoder.embed(TEXTS)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: encoder.embed(TEXTS), range(4)):
                assert furthest(expected, found) < 1e-6


@dataclass
class Crew:
    batch_tokens: int = 200
    most_texts: int = 10
    pads: bool = False
    workers: int = 4
    shares: list[tuple[bool, int]] = field(default_factory=list)

    def share(self, workers: int) -> Callable[[], object]:
        return lambda: self.shares.append((threading.current_thread() is threading.main_thread(), workers))


def test_every_text_is_in_one_batch_and_the_longest_are_first() -> None:
    lengths = [(number * 37) % 150 + 1 for number in range(200)]
    batches = [places for places, _ in workers.run(lengths, lambda places: None, Crew())]
    assert sorted(place for places in batches for place in places) == list(range(200))
    longest = [max(lengths[place] for place in places) for places in batches]
    assert longest == sorted(longest, reverse=True)
    assert max(map(len, batches)) == 10


def test_very_long_texts_have_all_cores() -> None:
    crew, at_work = Crew(), []

    def compute(places: list[int]) -> None:
        at_work.append((len(places) == 1, threading.current_thread() is threading.main_thread()))

    list(workers.run([5000, 3000, *[150] * 8], compute, crew))
    assert at_work[:2] == [(True, True), (True, True)]
    assert at_work[2:]
    assert not any(is_main for _, is_main in at_work[2:])
    assert (False, 4) in crew.shares
    assert crew.shares[-1] == (True, 1)


def test_cores_of_torch_are_shared_out_evenly(checkpoint: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        backend, _ = load_backend(checkpoint, dtype="f32", device="cpu")
        torch.set_num_threads(6)
        together = threading.Barrier(2)

        def begin() -> int:
            together.wait()
            return torch.get_num_threads()

        with ThreadPoolExecutor(2, initializer=backend.share(2)) as pool:
            assert [one.result() for one in (pool.submit(begin), pool.submit(begin))] == [3, 3]
        backend.share(1)()
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_few_batches_share_the_cores_between_them() -> None:
    crew = Crew(workers=8)
    list(workers.run([128, 128], lambda places: None, crew))
    assert {workers for is_main, workers in crew.shares if not is_main} == {2}


def test_one_that_fails_ends_the_others() -> None:
    begun = []

    def compute(places: list[int]) -> None:
        begun.append(places)
        raise ValueError("broken")

    crew = Crew(workers=2)
    with pytest.raises(ValueError, match="broken"):
        list(workers.run([150] * 100, compute, crew))
    assert len(begun) < 100
    assert crew.shares[-1] == (True, 1)
