"""A message's tokens and choices as bytes for the database."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence

from edgetune.engine.protocol import Candidate, TokenChoice


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as 32-bit little-endian integers."""
    return struct.pack(f"<{len(ids)}i", *ids)


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """The reverse of `pack_ids`."""
    return struct.unpack(f"<{len(data) // 4}i", data)


def pack_choices(choices: Sequence[TokenChoice]) -> bytes:
    """Choices as compressed JSON; nothing for none."""
    if not choices:
        return b""
    rows = [
        [
            *(choice.id, choice.start, choice.end, round(choice.probability, 6), round(choice.sampled, 6)),
            [[one.id, one.text, round(one.probability, 6), round(one.sampled, 6)] for one in choice.alternatives],
        ]
        for choice in choices
    ]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 1)


def unpack_choices(data: bytes) -> list[TokenChoice]:
    """The reverse of `pack_choices`, probabilities to six places."""
    if not data:
        return []
    return [
        TokenChoice(token, start, end, probability, sampled, tuple(Candidate(*values) for values in alternatives))
        for token, start, end, probability, sampled, alternatives in json.loads(zlib.decompress(data))
    ]
