"""A stage at work: its shard, who holds its slots, and at the head what sampling needs. Compute thread only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from peerllm.engine.base import Draw, Floats, Sampler, Segment, Shard
from peerllm.engine.messages import LoadStage
from peerllm.engine.schedule.batching import Piece
from peerllm.engine.state.slot_table import SlotTable
from peerllm.engine.wire.parcels import Activation, Drawn, Opened
from peerllm.errors import EngineError
from peerllm.types import Sampling

MEASURED_SIZES = 16  # sizes of batches told apart; the one not met for longest is forgotten
PACE_GAIN = 1 / 32  # weight of a new pass in the mean of its size, once there are as many


class LoadedStage:
    """The layers of one LoadStage, loaded."""

    def __init__(self, spec: LoadStage, shard: Shard, sampler: Sampler) -> None:
        self.spec, self.shard = spec, shard
        self.slots = SlotTable(spec.slots, spec.context)
        self.is_head = spec.stage == spec.stages - 1
        self._sampler = sampler
        self._answers: dict[int, tuple[Sampling, list[int]]] = {}  # at the head, by sequence: its ids so far
        # By sequences in a batch of steps: passes, mean ms, variance in ms².
        self._paces: dict[int, tuple[int, float, float]] = {}

    @property
    def paces(self) -> tuple[tuple[int, float, float], ...]:
        """By sequences in a batch of steps, rising: milliseconds that one took of late, taking in and sending too.

        And their standard deviation, as a share of the mean.
        """
        told = ((size, mean, variance) for size, (_, mean, variance) in sorted(self._paces.items()))
        return tuple((size, mean, math.sqrt(variance) / mean if mean > 0 else 0.0) for size, mean, variance in told)

    def paced(self, batch: Sequence[Piece], seconds: float) -> None:
        """The compute thread was at `batch` for so long, all told; prompts are not counted."""
        if not steps_only(batch):
            return
        count, mean, variance = self._paces.pop(len(batch), (0, 0.0, 0.0))
        gain, off = max(PACE_GAIN, 1 / (count + 1)), seconds * 1e3 - mean
        self._paces[len(batch)] = count + 1, mean + gain * off, (1 - gain) * (variance + gain * off * off)
        if len(self._paces) > MEASURED_SIZES:
            del self._paces[next(iter(self._paces))]

    @property
    def mean_step_ms(self) -> float | None:
        """Mean time of batches of as many steps as the last; None before the first."""
        return next(reversed(self._paces.values()))[1] if self._paces else None

    def open(self, opened: Opened) -> None:
        """FrameError if the slot is not to be had, or not with what the sequence is to begin with."""
        self.slots.open(opened.sequence, opened.slot, opened.position)
        if self.is_head:
            self._answers[opened.sequence] = opened.sampling, []

    def release(self, sequence: int, keep: int = 0) -> bool:
        """Frees a sequence's slot, in which its first `keep` tokens stay; False if it holds none."""
        slot = self.slots.release(sequence, keep)
        self._answers.pop(sequence, None)
        if slot is None:
            return False
        if slot not in self.slots.idle:
            self.shard.release(slot)
        return True

    def empty(self) -> None:
        """Nothing stays in idle slots."""
        for slot in self.slots.idle:
            self.slots.empty(slot)
            self.shard.release(slot)

    def compute(self, batch: Sequence[Piece]) -> Activation | Drawn:
        """Runs a batch of pieces through the layers, and at the head draws the tokens."""
        inputs = batch[0].data if len(batch) == 1 else np.concatenate([piece.data for piece in batch])
        segments = [Segment(piece.slot, piece.position, piece.length, piece.sample) for piece in batch]
        output = self.shard.forward(inputs, segments)
        return self._draw(batch, output) if self.is_head else Activation(batch, output)

    def _draw(self, batch: Sequence[Piece], logits: Floats) -> Drawn:
        """`logits` are float32 [pieces to sample after, vocabulary]."""
        asked = [piece for piece in batch if piece.sample]
        if logits.shape[0] != len(asked):
            raise EngineError(f"the shard gave {logits.shape[0]} rows of logits for {len(asked)} tokens to draw")
        answers = [self._answers[piece.sequence] for piece in asked]
        draws = [
            Draw(sampling, piece.position + piece.length, ids)
            for piece, (sampling, ids) in zip(asked, answers, strict=True)
        ]
        drawn = iter(self._sampler(logits, draws) if draws else [])
        tokens = [next(drawn) if piece.sample else None for piece in batch]
        for (_, ids), token in zip(answers, (token for token in tokens if token is not None), strict=True):
            ids.append(token)
        return Drawn(batch, tokens)

    def close(self) -> None:
        self._answers.clear()
        self.shard.close()


def steps_only(batch: Sequence[Piece]) -> bool:
    """One token of an answer each, no prompt."""
    return all(piece.sample and piece.length == 1 for piece in batch)
