"""Logarithms of tokens' probabilities, packed as devices tell each other: the drawn token, then the likeliest ones."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import starmap

MAX_LIKELIEST = 20  # that can be asked for with a token, as OpenAI has it
_ENTRY = struct.Struct("<if")  # token id, natural logarithm of its probability
ENTRY_BYTES = _ENTRY.size
MAX_ENTRIES = MAX_LIKELIEST + 1  # of one token

Entry = tuple[int, float]


def packed(entries: Iterable[Entry]) -> bytes:
    """Of one token that was drawn, whose own entry comes first."""
    return b"".join(starmap(_ENTRY.pack, entries))


def named_ids(packed: Sequence[bytes]) -> int:
    """How many ids each of them names; all of one answer name as many."""
    return len(packed[0]) // ENTRY_BYTES if packed else 0


def unpacked(data: bytes) -> list[Entry]:
    """The entries; ValueError if they are none, or too many, or not what logarithms of probabilities can be."""
    if not data or len(data) % ENTRY_BYTES or len(data) > MAX_ENTRIES * ENTRY_BYTES:
        raise ValueError(f"log probabilities of {len(data)} bytes")
    entries = list(_ENTRY.iter_unpack(data))
    if not all(token >= 0 and -math.inf < value <= 0.0 for token, value in entries):  # NaN is neither
        raise ValueError("log probabilities that are none")
    return entries
