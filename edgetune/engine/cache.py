"""What the KV cache holds: which tokens each sequence has, under which adapters; and states that wait in main memory.

Entries are found by (adapter set, tokens), so that nothing computed under other adapters can be taken up, and a switch
there and back finds the old entries again. A sequence that no reply is using is moved out of the context when another
one begins: attention walks over every cell in use, whoever owns it. What was moved out comes back by a copy instead of
an evaluation. Nothing is evaluated here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from edgetune.engine.native import lib
from edgetune.errors import EdgetuneError
from edgetune.hardware import available_memory

SEQUENCES = 4
"""How many sequences one context can hold side by side."""
_SHARE_OF_FREE = 0.2
"""Part of the free memory that waiting states may take, each time one is put away."""
_WORTH_KEEPING = 32
"""A state of fewer tokens is evaluated again sooner than it is copied."""


@dataclass(eq=False)
class Slot:
    """A sequence in the context."""

    number: int
    """llama.cpp's sequence id."""
    key: Hashable = None
    """The adapter set its entries were computed under."""
    ids: list[int] = field(default_factory=list)
    """The tokens whose entries it holds, by position."""
    in_use: bool = False
    """Whether a reply is being made on it."""
    used: int = 0
    """When it was taken last, in takes."""


@dataclass
class _Waiting:
    """A state outside the context."""

    key: Hashable
    ids: list[int]
    state: ctypes.Array[ctypes.c_uint8]


@dataclass(frozen=True)
class _Shifted:
    """The key of entries that were moved: computed in the presence of tokens that are gone."""

    key: Hashable


class KvCache:
    """The sequences of one llama.cpp context, and the states put away from it."""

    def __init__(self, context: Any, *, window: int) -> None:
        """For `context`, made with `SEQUENCES` sequences in one unified cache; `window` is the model's sliding one."""
        self._context, self._window = context, window
        self._memory = lib.llama_get_memory(context)
        self._size: int = lib.llama_n_ctx(context)
        self._slots = [Slot(number) for number in range(SEQUENCES)]
        self._waiting: list[_Waiting] = []
        self._takes = 0

    @property
    def latest(self) -> Slot:
        """The sequence that was taken last."""
        return max(self._slots, key=lambda slot: slot.used)

    @property
    def can_shift(self) -> bool:
        """Whether entries can be moved to other positions."""
        return bool(lib.llama_memory_can_shift(self._memory)) and not self._window

    def clear(self) -> None:
        """Forget every entry, in the context and outside it."""
        lib.llama_memory_clear(self._memory, False)
        self._waiting.clear()
        for slot in self._slots:
            slot.ids.clear()

    def take(self, key: Hashable, ids: Sequence[int], *, shift: bool = False) -> Slot:
        """A sequence for a text that begins with `ids`, with as many of their entries in it as are kept anywhere.

        `shift` lets it have entries that were moved. The caller frees it with `release`, and calls `keep_prefix`
        before it evaluates. Only sequences in use stay in the context beside it.
        """
        idle = [slot for slot in self._slots if not slot.in_use]
        if not idle:
            raise EdgetuneError(f"{SEQUENCES} replies are running already; one context takes no more at a time.")
        if shift and _Shifted(key) in (*(slot.key for slot in idle), *(one.key for one in self._waiting)):
            key = _Shifted(key)
        self._forget_what_waits_in_vain(key)
        slot = max(idle, key=lambda slot: (_shared(slot, key, ids), not slot.ids, -slot.used))
        waiting = max(self._waiting, key=lambda one: _shared(one, key, ids), default=None)
        if waiting and _shared(waiting, key, ids) > _shared(slot, key, ids):
            slot = max(idle, key=lambda slot: (not slot.ids, -slot.used))
            self.put_away(slot)
            self._bring_back(waiting, slot)
        elif not shift and 2 * _shared(slot, key, ids) < len(slot.ids):
            # Most of what it holds would be lost to a text that is largely another one.
            self.put_away(slot, keep=_shared(slot, key, ids))
        for other in idle:
            if other is not slot:
                self.put_away(other)
        self._takes += 1
        slot.in_use, slot.used, slot.key = True, self._takes, key
        self._copy_from_neighbour(slot, ids)
        return slot

    def release(self, slot: Slot) -> None:
        """The reply on `slot` has ended; its entries stay as long as nobody needs the room."""
        slot.in_use = False

    def keep_prefix(self, slot: Slot, ids: Sequence[int]) -> int:
        """Drop the entries of `slot` that do not belong to `ids`, and that of the last token; returns how many stay."""
        # The last token is always evaluated again: its logits are needed.
        kept = common_length(slot.ids, ids[:-1])
        if kept and self._window:
            # A sliding-window cache has dropped what lies behind the window of its newest token; going back needs it.
            oldest = lib.llama_memory_seq_pos_min(self._memory, slot.number)
            kept = kept if 0 <= oldest <= max(0, kept - self._window) else 0
        return self.truncate(slot, kept)

    def truncate(self, slot: Slot, length: int) -> int:
        """Keep the first `length` tokens of `slot`, or none where the model cannot go back; returns how many stay."""
        # Also drops an entry that an interrupt kept from being recorded. Recurrent models cannot go back at all.
        if not length or not lib.llama_memory_seq_rm(self._memory, slot.number, length, -1):
            lib.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
            slot.ids.clear()
            return 0
        del slot.ids[length:]
        return length

    def shift_towards(self, slot: Slot, ids: Sequence[int]) -> bool:
        """Where `ids` lacks a piece in the middle of what `slot` holds, take it out and move the rest up.

        What follows was computed in the presence of what is gone; the entries are kept apart from exact ones.
        """
        start = common_length(slot.ids, ids)
        count = _gap(slot.ids[start:], ids[start:])
        if not count or not self.can_shift:
            return False
        lib.llama_memory_seq_rm(self._memory, slot.number, start, start + count)
        lib.llama_memory_seq_add(self._memory, slot.number, start + count, -1, -count)
        del slot.ids[start : start + count]
        slot.key = _Shifted(adapters_of(slot))
        return True

    def room(self) -> int:
        """How many tokens the context still takes beside those it holds, all sequences together."""
        return self._size - sum(len(slot.ids) for slot in self._slots)

    def is_full(self, *, unsure: int = 0) -> bool:
        """Whether there is no room for one more token of each sequence in use; `unsure` entries may go again."""
        room = self._size + unsure
        for slot in self._slots:
            room -= len(slot.ids) + slot.in_use
        return room < 0

    @property
    def running(self) -> int:
        """How many sequences are in use."""
        return sum(slot.in_use for slot in self._slots)

    def read_state(self, slot: Slot) -> ctypes.Array[ctypes.c_uint8]:
        """The entries of `slot` as bytes that `write_state` takes."""
        size = lib.llama_state_seq_get_size(self._context, slot.number)
        state: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        lib.llama_state_seq_get_data(self._context, state, size, slot.number)
        return state

    def write_state(self, slot: Slot, ids: Sequence[int], state: ctypes.Array[ctypes.c_uint8]) -> bool:
        """Fill the empty `slot` with the entries of `ids`; False, and the slot empty, when the context refuses them."""
        if lib.llama_state_seq_set_data(self._context, state, len(state), slot.number) != len(state):
            self.truncate(slot, 0)
            return False
        slot.ids[:] = ids
        return True

    def adopt(
        self, key: Hashable, ids: Sequence[int], state: ctypes.Array[ctypes.c_uint8], *, wanted: Sequence[int]
    ) -> int:
        """Take up entries of `ids` that were kept elsewhere, if `wanted` begins with most of them; returns how many."""
        shared = common_length(ids, wanted)
        if 2 * shared < len(ids):
            return 0
        slot = self.take(key, ())
        self.put_away(slot)
        taken = len(ids) <= self.room() and self.write_state(slot, ids, state)
        self.release(slot)
        return shared if taken else 0

    def put_away(self, slot: Slot, *, keep: int = 0) -> None:
        """Copy the entries of `slot` to main memory, where there is room, and leave the first `keep` in the context."""
        if len(slot.ids) >= _WORTH_KEEPING:
            size = lib.llama_state_seq_get_size(self._context, slot.number)
            budget = int(available_memory() * _SHARE_OF_FREE)
            while self._waiting and size + sum(len(one.state) for one in self._waiting) > budget:
                del self._waiting[0]
            if size <= budget:
                self._waiting.append(_Waiting(slot.key, list(slot.ids), self.read_state(slot)))
        if not self._window or not keep:
            self.truncate(slot, keep)

    def _bring_back(self, waiting: _Waiting, slot: Slot) -> None:
        self._waiting.remove(waiting)
        if len(waiting.ids) <= self.room():
            self.write_state(slot, waiting.ids, waiting.state)

    def _forget_what_waits_in_vain(self, key: Hashable) -> None:
        # What a longer text of the same adapters goes on from is in that text's own state as well.
        self._waiting = [
            one
            for one in self._waiting
            if one.key != key
            or not any(slot.key == key and common_length(slot.ids, one.ids) == len(one.ids) for slot in self._slots)
        ]

    def _copy_from_neighbour(self, slot: Slot, ids: Sequence[int]) -> None:
        """Share the entries of another sequence's beginning, which costs nothing, where it holds more of `ids`."""
        others = [other for other in self._slots if other is not slot and other.key == slot.key]
        best = max(others, key=lambda other: common_length(other.ids, ids), default=None)
        if best is None or self._window or common_length(best.ids, ids) <= common_length(slot.ids, ids):
            return
        length = common_length(best.ids, ids)
        self.truncate(slot, 0)
        lib.llama_memory_seq_cp(self._memory, best.number, slot.number, 0, length)
        slot.ids[:] = best.ids[:length]


def adapters_of(slot: Slot) -> Hashable:
    """The adapter set of its entries, moved or not."""
    return slot.key.key if isinstance(slot.key, _Shifted) else slot.key


def _gap(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many tokens have to leave the beginning of `held` so that the rest is the beginning of `wanted`; 0: none."""
    for count in range(1, len(held) - _WORTH_KEEPING + 1):
        if held[count] == wanted[0] and held[count:] == wanted[: len(held) - count]:
            return count
    return 0


def _shared(held: Slot | _Waiting, key: Hashable, ids: Sequence[int]) -> int:
    return common_length(held.ids, ids) if held.key == key else 0


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
