"""A stage that is loaded: its shards, and at the head what sampling needs. Compute thread only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from peerllm.engine.base import Draw, Floats, Sampler
from peerllm.engine.messages import LoadStage
from peerllm.engine.sampler import token_logprobs
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.pooling import Pool
from peerllm.engine.wire.parcels import Drawn, Masked, Opened, TokenBatch, first_attempt, quantised
from peerllm.engine.wire.state_frames import CarriedPart
from peerllm.errors import EngineError, FrameError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling

MEASURED_SIZES = 16  # sizes of batches told apart; the one not met for longest is forgotten
PACE_GAIN = 1 / 32  # weight of a new pass in the mean of its size, once there are as many
GONE_BACK = 1  # epochs that a source may have been in and left again: its OPENs are numbered on from there
NOT_FINITE = "the model computed hidden states that are no finite numbers; try --exact"

Failures = list[tuple[TokenRun, str]]  # runs of a batch whose sequences cannot go on, and why
_DrawnRun = tuple[TokenRun, int | None, bytes]  # with the token drawn after it, and what was asked about that


@dataclass(slots=True)
class _Drawing:
    """What the head knows of one sequence."""

    sampling: Sampling
    ids: list[int]  # the answer so far
    logprobs: int | None = None  # are wanted of so many of the likeliest tokens
    undrawn: tuple[TokenRun, Floats] | None = None  # logits [1, vocabulary] after this run, whose mask is not there


class LoadedStage:
    """The layers of one LoadStage: shards, one after the other, that stages of other epochs may use too."""

    def __init__(self, spec: LoadStage, chain: Sequence[HeldShard], sampler: Sampler) -> None:
        self.spec, self.chain = spec, tuple(chain)
        self.is_head = spec.stage == spec.stages - 1
        self._sampler = sampler
        self._answers: dict[int, _Drawing] = {}  # at the head, by sequence
        self._masks: dict[int, Masked] = {}  # at the head, by slot: the last; it may come before its sequence's OPEN
        self._pools: dict[int, Pool] = {}  # at the head, by sequence whose prompt becomes a vector
        # By sequences in a batch of steps: passes, mean ms, variance in ms².
        self._paces: dict[int, tuple[int, float, float]] = {}

    @property
    def paces(self) -> tuple[tuple[int, float, float], ...]:
        """(sequences in a batch of steps, rising; mean milliseconds of late; standard deviation as a share of that).

        The milliseconds include taking the batch in and handing its result on.
        """
        told = ((size, mean, variance) for size, (_, mean, variance) in sorted(self._paces.items()))
        return tuple((size, mean, math.sqrt(variance) / mean if mean > 0 else 0.0) for size, mean, variance in told)

    def paced(self, runs: Sequence[TokenRun], seconds: float) -> None:
        """The compute thread spent so long on a batch of these runs; only batches of steps count."""
        if not steps_only(runs):
            return
        count, mean, variance = self._paces.pop(len(runs), (0, 0.0, 0.0))
        gain, off = max(PACE_GAIN, 1 / (count + 1)), seconds * 1e3 - mean
        self._paces[len(runs)] = count + 1, mean + gain * off, (1 - gain) * (variance + gain * off * off)
        if len(self._paces) > MEASURED_SIZES:
            del self._paces[next(iter(self._paces))]

    @property
    def mean_step_ms(self) -> float | None:
        """Mean time of batches of as many steps as the last; None before the first."""
        return next(reversed(self._paces.values()))[1] if self._paces else None

    def __contains__(self, sequence: int) -> bool:
        return sequence in self.chain[0].slots

    @property
    def in_use(self) -> int:
        """Slots of sequences that are computed in this stage's epoch."""
        return max(one.slots.in_use(self.spec.epoch) for one in self.chain)

    def open(self, opened: Opened, answer: Sequence[int] = (), others: Sequence[HeldShard] = ()) -> Opened | None:
        """Let a sequence in, after the tokens that its slot is to hold; the parcel with what is lacking of them.

        None if it came late. `answer`: its ids so far, at the head. `others`: the deployment's shards on this device.
        FrameError if the slot does not exist, or its number is of a much later epoch: others would come late after it.
        """
        sequence, position = opened.sequence, opened.position
        if opened.attempt >= first_attempt(self.spec.epoch + 1 + GONE_BACK):
            raise FrameError(f"OPEN number {opened.attempt} is of a later epoch than {self.spec.epoch}")
        asked = self._up_to(opened.through)
        if any(one.slots.is_late(sequence, opened.slot, opened.attempt) for one in asked):
            return None
        for one in asked:
            one.take_over(sequence, opened.slot, self.spec.epoch, position, others)
            found = one.slots.enter(sequence, opened.slot, position, self.spec.epoch, opened.after, opened.attempt)
            if found < position:
                opened = opened.lacks(one.last_layer, found)
        if self.is_head:  # an OPEN may have ended another sequence, whose RELEASE does not come
            self._answers = {one: known for one, known in self._answers.items() if one in self}
            self._answers[sequence] = _Drawing(opened.sampling, list(answer), opened.logprobs)
            self._pools = {one: known for one, known in self._pools.items() if one in self}
            if opened.pool is not None:
                self._pools[sequence] = Pool(opened.pool)
        return opened

    def take_part(self, carried: CarriedPart) -> None:
        """See HeldShard."""
        for one in self.chain:
            forms = one.shard.state_forms(one.first_layer, one.last_layer)
            if carried.part.block in (*forms.tokens, *forms.fixed):
                one.take_part(carried)

    def standing(self, sequence: int, slot: int) -> set[int]:
        """The sequences of which something may wait that an OPEN for this sequence and slot makes void."""
        return set().union(*(one.slots.standing(sequence, slot) for one in self.chain))

    def extend(self, run: TokenRun) -> bool:
        """Take in a run; False if it is to be dropped, FrameError if its sequence cannot go on (see SlotTable)."""
        asked = self._up_to(run.through)
        # If one shard drops the run because it lacks tokens, those up to it are opened again before it is repeated.
        # Those after it are not: if they took it in now, the repeated run would count there as one that came late.
        return bool(asked) and all(one.slots.extend(run, self.spec.epoch) for one in asked)

    def release(self, sequence: int, keep: int = 0) -> bool:
        """Free a sequence's slot, in which its first `keep` tokens stay; False if it is not computed in this epoch."""
        self._answers.pop(sequence, None)
        self._pools.pop(sequence, None)
        free = [(one, one.slots.release(sequence, keep, self.spec.epoch)) for one in self.chain]
        for one, slot in free:
            if slot is not None and not one.slots.kept(slot):
                one.shard.release(slot)
        return any(slot is not None for _, slot in free)

    def compute(self, batch: TokenBatch) -> tuple[TokenBatch | Drawn | None, Failures]:
        """Run a batch through the layers and, at the head, draw the tokens: (what to hand on, which runs failed)."""
        runs, through = batch.runs, batch.runs[0].through
        output = batch.rows
        pooled = [run for run in runs if run.sequence in self._pools]
        for one in self._up_to(through):
            if pooled and one is self.chain[-1]:
                return self._pool(one, TokenBatch(runs, output), pooled)
            output = one.shard.forward(output, runs)
            for run in runs:
                one.slots.computed(run)
        if 0 <= through <= self.spec.last_layer:  # chunks are batches of their own
            return Drawn(runs, [None] * len(runs)), []
        if self.is_head:
            return self._draw(runs, output)
        hidden = TokenBatch(runs, output)
        if self.spec.downstream_activations == "exact":
            return hidden, []
        rounded, lost = quantised(hidden)
        return rounded, [(run, NOT_FINITE) for run in lost]

    def _up_to(self, layer: int) -> list[HeldShard]:
        """The shards whose layers are not after `layer`; all if that is -1."""
        return [one for one in self.chain if layer < 0 or one.last_layer <= layer]

    def _pool(self, last: HeldShard, batch: TokenBatch, pooled: Sequence[TokenRun]) -> tuple[Drawn | None, Failures]:
        """The last shard's part of a batch of which some runs are `pooled`, and the others are drawn after."""
        drawn: list[_DrawnRun] = []
        vectors: list[Floats] = []
        failed: Failures = []
        for run in pooled:
            pool = self._pools[run.sequence]
            pool.add(last.shard.last_states(batch.only([run]).rows, run))
            last.slots.computed(run)
            try:
                vectors += [pool.vector()] if run.sample else []
            except EngineError as error:
                failed.append((run, str(error)))
            else:
                drawn.append((run, None, b""))
        others = [run for run in batch.runs if run not in pooled]
        if others:
            logits = last.shard.forward(batch.only(others).rows, others)
            for run in others:
                last.slots.computed(run)
            made, lost = self._draw(others, logits)
            failed += lost
            drawn += [(run, token, logprobs) for run, token, _, logprobs in made.each()] if made is not None else ()
        return _whole(drawn, vectors), failed

    def _draw(self, runs: Sequence[TokenRun], logits: Floats) -> tuple[Drawn | None, Failures]:
        """`logits` are float32 [runs to sample after, vocabulary]. A row that gives no token fails its run alone."""
        asked = sum(run.sample for run in runs)
        if logits.shape[0] != asked:
            raise EngineError(f"the shard gave {logits.shape[0]} rows of logits for {asked} tokens to draw")
        drawn: list[_DrawnRun] = []
        failed: Failures = []
        row = -1
        for run in runs:
            if not run.sample:
                drawn.append((run, None, b""))
                continue
            row += 1
            own = logits[row : row + 1]
            if run.masked and self._mask(run) is None:
                self._answers[run.sequence].undrawn = run, own.copy()
                continue
            try:
                drawn.append((run, *self._pick(run, own)))
            except EngineError as error:
                failed.append((run, str(error)))
        return _whole(drawn), failed

    def masked(self, masked: Masked) -> tuple[Drawn | None, Failures]:
        """At the head: a mask has come. What was computed before it is drawn now."""
        self._masks[masked.slot] = masked
        known = self._answers.get(masked.sequence)
        if known is None or known.undrawn is None or self._mask(known.undrawn[0]) is None:
            return None, []
        (run, logits), known.undrawn = known.undrawn, None
        try:
            return _whole([(run, *self._pick(run, logits))]), []
        except EngineError as error:
            return None, [(run, str(error))]

    def _mask(self, run: TokenRun) -> bytes | None:
        """That for the token after a run, if it is there."""
        masked = self._masks.get(run.slot)
        place = run.sequence, run.position + run.length
        return masked.mask if masked is not None and (masked.sequence, masked.position) == place else None

    def _pick(self, run: TokenRun, logits: Floats) -> tuple[int, bytes]:
        """A token, and what was asked about it."""
        known, mask = self._answers[run.sequence], self._mask(run) if run.masked else None
        (token,) = self._sampler(logits, [Draw(known.sampling, run.position + run.length, known.ids, mask)])
        known.ids.append(token)
        return token, b"" if known.logprobs is None else token_logprobs(logits[0], token, known.logprobs)


def _whole(drawn: Sequence[_DrawnRun], vectors: Sequence[Floats] = ()) -> Drawn | None:
    if not drawn:
        return None
    runs, tokens, logprobs = zip(*drawn, strict=True)
    return Drawn(runs, tokens, vectors, logprobs if any(logprobs) else ())


def steps_only(runs: Sequence[TokenRun]) -> bool:
    """Whether every run is a step."""
    return all(run.is_step for run in runs)
