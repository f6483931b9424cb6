"""Bytes beyond weights and KV: the working space of a pass, and how a prompt is cut so that it stays small."""

from __future__ import annotations

from peerllm.types import WorkingSpace

MAX_CHUNK = 128  # tokens of a prompt in one frame, unless more are asked for
MOST_CHUNK = 4096  # ... and then at most
MIN_CHUNK = 16
SCORES_BYTES = 64 << 20  # of one chunk's attention over a full slot


def chunk_tokens(space: WorkingSpace, context: int) -> int:
    """Tokens of a prompt that travel in one frame: fewer where their attention over a full slot takes much room."""
    return max(MIN_CHUNK, min(MAX_CHUNK, context, SCORES_BYTES // max(1, _seen(space, context) * space.pair)))


def working_bytes(space: WorkingSpace, context: int, slots: int, chunk: int | None = None) -> int:
    """The most that is held beside weights and KV: in a pass, or while a stage is loaded, before there is KV."""
    tokens = max(chunk or chunk_tokens(space, context), slots)
    pairs = tokens * space.pair * _seen(space, context)
    passing = tokens * space.token + pairs + context * space.position + slots * space.sequence
    return max(passing, space.loading) + space.once


def _seen(space: WorkingSpace, context: int) -> int:
    return context if space.window is None else min(context, space.window)
