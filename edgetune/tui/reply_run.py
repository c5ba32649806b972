"""A reply on its way to the screen: the engine's thread makes it, the screen looks at it several times a second.

Nothing is handed over token by token: the reply's own text and choices are read where they grow. How often is decided
by what a frame costs, so that drawing takes a small share of the time of decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edgetune.chat.conversation import Conversation
from edgetune.chat.reply import Reply
from edgetune.tui.live import Live

FASTEST = 1 / 20
"""Seconds between frames at most often."""
_SLOWEST = 1 / 6
_SHARE = 0.025
"""Of the time, this much may go into drawing while there is something to decode."""
SELDOM = 1 / 4
"""Seconds between looks at numbers and plots, which nobody reads faster than that."""


class Pacer:
    """Says when the next frame is due, by what the frames before cost this thread."""

    def __init__(self) -> None:
        self._last, self._spent = time.monotonic(), time.thread_time()
        self._wait = FASTEST

    def is_due(self) -> bool:
        """Whether to draw now."""
        now = time.monotonic()
        if now - self._last < self._wait:
            return False
        spent = time.thread_time()
        cost = spent - self._spent
        # Half of the old pace stays, so that one expensive frame does not make a pause.
        wanted = min(max(cost / _SHARE, FASTEST), _SLOWEST)
        self._wait = (self._wait + wanted) / 2
        self._last, self._spent = now, spent
        return True


class Clock:
    """Says when something that is to happen every so many seconds is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, 0.0

    def is_due(self) -> bool:
        """Whether to do it now."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True


class ReplyRun:
    """One reply, or several side by side, from the first token to the last."""

    def __init__(self, conversation: Conversation, replies: Sequence[Reply]) -> None:
        self.replies = list(replies)
        self.lives = [Live(reply.node) for reply in replies]
        self._conversation = conversation
        self._parts: list[tuple[str, str]] = [("", "") for _ in replies]
        self._looked = 0.0
        self.is_cancelled = False
        """Whether it was to end early."""

    def pump(self, between_tokens: Callable[[], None] = lambda: None) -> None:
        """Make them, to the end, with other work in between. For the engine's thread."""
        if len(self.replies) == 1:
            steps: Iterator[object] = iter(self.replies[0])
        else:
            steps = self._conversation.run_together(self.replies)
        reasons = self._conversation.thinking is not None
        for _ in steps:
            between_tokens()
            if reasons and (now := time.monotonic()) - self._looked >= FASTEST:
                self._looked = now
                self._read_parts()
        if reasons:
            self._read_parts()

    def cancel(self) -> None:
        """Let them end after the next token. For any thread."""
        self.is_cancelled = True
        for reply in self.replies:
            reply.cancel()

    def look(self, *, is_over: bool = False) -> None:
        """Bring `lives` up to what was said. For the screen's thread."""
        reasons = self._conversation.thinking is not None
        for number, (reply, live) in enumerate(zip(self.replies, self.lives, strict=True)):
            # The last choice is still being written while a reply runs, and text may be held back for a stop string.
            choices, text = reply.choices, reply.text
            count = len(choices) - (0 if is_over else 1)
            while count > 0 and choices[count - 1].end > len(text):
                count -= 1
            live.generated, live.choices = text, choices[: max(count, 0)]
            live.reasoning, live.answer = self._parts[number] if reasons else ("", text)
            live.is_over = is_over

    def _read_parts(self) -> None:
        self._parts = [reply.parts() for reply in self.replies]
