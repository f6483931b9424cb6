"""The working space of a pass, and prompt chunks small enough for it."""

from __future__ import annotations

from peerllm.types import WorkingSpace

MAX_CHUNK = 128  # tokens of a prompt in one frame, by default
MOST_CHUNK = 4096  # tokens that may be asked for
MIN_CHUNK = 16
SCORES_BYTES = 64 << 20  # attention scores of one chunk over a full slot


def chunk_tokens(space: WorkingSpace, context: int) -> int:
    """Tokens of a prompt in one frame: fewer where their attention over a full slot takes much memory."""
    return max(MIN_CHUNK, min(MAX_CHUNK, context, SCORES_BYTES // max(1, _seen(space, context) * space.pair)))


def working_bytes(space: WorkingSpace, context: int, slots: int, chunk: int | None = None) -> int:
    """The most bytes held beside weights and KV: in a pass, or while a stage loads and there is no KV yet."""
    tokens = max(chunk or chunk_tokens(space, context), slots)
    pairs = tokens * space.pair * _seen(space, context)
    passing = tokens * space.token + pairs + context * space.position + slots * space.sequence
    return max(passing, space.loading) + space.once


def _seen(space: WorkingSpace, context: int) -> int:
    return context if space.window is None else min(context, space.window)
