"""The one thread that calls the engine: work waits its turn, the screen never waits.

llama.cpp's contexts belong to one thread at a time. What may be called from any thread (`cancel`, `change_sampling`)
is not queued here.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class EngineWorker:
    """Runs functions one after the other on a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._latest: dict[str, Future[Any]] = {}
        self._between: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._waiting = 0

    @property
    def is_busy(self) -> bool:
        """Whether something runs or waits."""
        return self._waiting > 0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` when everything before it is done."""
        with self._lock:
            self._waiting += 1
        future = self._pool.submit(work)
        future.add_done_callback(self._done)
        return future

    async def run(self, work: Callable[[], T]) -> T:
        """The value of `work`, run on the engine's thread; what it raises is raised."""
        return await asyncio.wrap_future(self.submit(work))

    async def run_latest(self, name: str, work: Callable[[], T]) -> T | None:
        """As `run`, but work of this `name` that has not begun yet gives way, and then None is its value."""
        if (before := self._latest.get(name)) is not None:
            before.cancel()
        future = self._latest[name] = self.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancelled() and self._latest.get(name) is not future:
                return None
            raise

    async def run_between(self, work: Callable[[], T]) -> T:
        """As `run`, but between two tokens of the reply that runs, if one does."""
        value: Future[T] = Future()

        def settle() -> None:
            if not value.set_running_or_notify_cancel():
                return
            try:
                value.set_result(work())
            except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
                value.set_exception(error)

        self._between.append(settle)
        # Whoever comes first does it: the reply at its next token, or the thread when it has nothing else to do.
        self.submit(self.between_tokens)
        return await asyncio.wrap_future(value)

    def between_tokens(self) -> None:
        """Do what waits for `run_between`. For the engine's thread."""
        while self._between:
            self._between.popleft()()

    def close(self) -> None:
        """Take nothing new; what waits is dropped, what runs is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting -= 1
