"""Runs and batches for tests that need no sequence number beside the slot's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peerllm.engine.wire.parcels import TokenBatch
from peerllm.transport.frames.token_run import TokenRun


def in_slot(slot: int, position: int, length: int, sample: bool = False) -> TokenRun:
    """A run of the sequence that has its slot's number."""
    return TokenRun(slot, slot, position, length, sample)


def batch_of(*runs: TokenRun) -> TokenBatch:
    """A batch whose rows are numbered."""
    return TokenBatch(runs, np.arange(sum(run.length for run in runs)))


def sequences(batch: TokenBatch | Sequence[TokenRun]) -> list[int]:
    """Whose runs they are, in order."""
    return [run.sequence for run in (batch.runs if isinstance(batch, TokenBatch) else batch)]
