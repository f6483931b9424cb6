"""A deployment's source at work: feeds its sequences to the first stage, takes back what the head drew, changes epochs.

A sequence changes its epoch between two steps: once what was fed of it in the old one is back, or as soon as that
cannot be expected any more, because the old epoch is broken or nothing has come back from it for long. A sequence whose
epoch is broken waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

from peerllm.engine.base import Floats
from peerllm.engine.masks.mask_maker import MadeMask, MaskMaker
from peerllm.engine.messages import Done, Failed, FinishReason, FromEngine, Submit, Switch, Tokens
from peerllm.engine.sampler import penalises
from peerllm.engine.schedule.epoch_ring import EpochRing, RingCounts
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.engine.schedule.step_schedules import SCHEDULES
from peerllm.engine.wire.parcels import ALL_SEQUENCES, Drawn, Opened, Parcel, Released, TokenBatch
from peerllm.errors import FrameError, PeerLLMError
from peerllm.transport.frames.token_run import TokenRun

LEAST_PATIENCE_S = 0.25  # an epoch that is left has so long to bring back what is under way, at least
MOST_PATIENCE_S = 5.0
PATIENCE_LAPS = 3  # ... and so many times as long as it lately took at most until something came back
KEPT = 31 / 32  # of that time, at each thing that comes back


class SourceFeed:
    """Of one deployment, whose epochs are `rings`; `ring` is the one in which sequences are fed.

    None: it was unloaded, and sequences wait for another.
    """

    def __init__(
        self,
        ring: EpochRing,
        rings: Mapping[int, EpochRing],
        tell: Callable[[FromEngine], None],
        counts: RingCounts,
        clock: Callable[[], float] = perf_counter,
        masks: MaskMaker | None = None,
    ) -> None:
        first = ring.stages[0]
        spec, shard = first.spec, first.chain[0].shard
        sizes = spec.slots, spec.context, spec.chunk, spec.stages, shard.vocabulary
        self.ring: EpochRing | None = ring
        self.sequences = SourceSequences(spec.deployment, *sizes, shard.reach, spec.cuts, spec.epoch)
        self._id, self._rings, self._tell, self._counts, self._clock = spec.deployment, rings, tell, counts, clock
        self._masks, self._vocabulary = masks, shard.vocabulary
        self._turns = SCHEDULES[spec.schedule](spec.micro_batch, spec.micro_batches)
        self._switches: list[Switch] = []  # not answered yet
        self._fed_at = self._old_at = clock()  # when a sequence entered, or something came back; from an old epoch
        self._longest_s = 0.0  # until something came back, of late

    # ---- from the daemon --------------------------------------------------------------------------------------------

    def submit(self, order: Submit) -> None:
        """Start a sequence, or go on with one. If it cannot start, its end is told with the reason."""
        if (finish := _finish_of(order, self.sequences.context)) is not None:
            self._tell(Tokens(self._id, order.sequence, len(order.answer), (), finish))
            return
        try:
            self.sequences.submit(order)
        except PeerLLMError as error:
            self._tell(Tokens(self._id, order.sequence, len(order.answer), (), "error", str(error)))
            return
        if order.constraint is not None and self._masks is not None:
            about = order.constraint, self._vocabulary, order.stop_ids, order.answer
            self._masks.begin((self._id, order.sequence), *about)
        self.sequences.leave(order.sequence)
        self._enter_waiting()
        self._feed()

    def mask_made(self, made: MadeMask) -> None:
        """Which tokens a sequence may go on with is known; its step is on the way, or waits at the head for this."""
        sequence = made.sequence
        if sequence not in self.sequences.running:
            return
        if made.error or not any(made.mask):
            self._finish(sequence, "error" if made.error else "stop", made.error)
            self._answer_switches()
            self._feed()
        else:
            self.sequences.take_mask(sequence, made.count, made.mask)
            self._tell_head(sequence)

    def cancel(self, sequence: int) -> None:
        if sequence in self.sequences.running:
            self._finish(sequence, "cancelled")
            self._answer_switches()
            self._feed()

    def switch(self, message: Switch) -> None:
        """Feed sequences in another epoch from now on, whose links stand."""
        ring = self._rings.get(message.epoch)
        if ring is None or 0 not in ring.stages:
            reason = f"epoch {message.epoch} has no first stage here"
            self._tell(Failed(message.request, "RefusedError", reason))
        elif not ring.stands:
            reason = ring.broken or "not all of its links stand"
            self._tell(Failed(message.request, "LinkError", f"epoch {message.epoch}: {reason}"))
        else:
            self._switches.append(message)
            self.feed_in(ring)

    def feed_in(self, ring: EpochRing) -> None:
        """Feed sequences in this epoch from now on; those that run change to it."""
        if ring is not self.ring:
            spec, turns = ring.stages[0].spec, self._turns
            self.ring = ring
            self._turns = SCHEDULES[spec.schedule](spec.micro_batch, spec.micro_batches)
            for sequence in self.sequences.running:
                if turns.waits(sequence):
                    self.sequences.leave(sequence)
            self.sequences.change_to(spec)
            self._old_at = self._clock()
        self._move()
        self._feed()

    def hurry(self) -> None:
        """Time has passed: what an old epoch does not bring back is given up."""
        patience_s = min(max(LEAST_PATIENCE_S, PATIENCE_LAPS * self._longest_s), MOST_PATIENCE_S)
        if self._switches and self._clock() - self._old_at > patience_s:
            self._move(at_once=True)
            self._feed()

    def close(self, reason: str) -> None:
        """End all sequences."""
        for sequence in self.sequences.running:
            self._end_masks(sequence)
            tokens = self.sequences.end(sequence, "error", reason)
            if tokens is not None:
                self._tell(tokens)
        for message in self._switches:
            self._tell(Failed(message.request, "RefusedError", reason))
        self._switches.clear()

    # ---- from the rings ---------------------------------------------------------------------------------------------

    def came_round(self, ring: EpochRing, parcel: Parcel) -> None:
        """See RingEnd."""
        match parcel:
            case Drawn():
                self._note_return(ring)
                for run, token, vector, logprobs in parcel.each():
                    self._came_back(ring, run, token, vector, logprobs)
            case Opened(sequence):
                if self.sequences.epoch_of(sequence) == ring.epoch:
                    self._opened(ring, parcel)
            case Released(sequence, _, reason) if sequence == ALL_SEQUENCES:
                ring.interrupt(reason or "a later stage lost its link")
            case Released(sequence, _, reason):
                if not reason:
                    self.sequences.drained(sequence)
                elif self.sequences.epoch_of(sequence) == ring.epoch:
                    self._finish(sequence, "error", reason)
                elif sequence not in self.sequences.running:  # it failed after it had ended: not every stage keeps it
                    self.sequences.forget(sequence)
            case _:
                raise FrameError("no hidden states go back to the source")
        if ring is not self.ring:
            self._move()
        self._feed()

    def broke(self, ring: EpochRing) -> None:
        """See RingEnd: its sequences wait for another epoch; if there is one already, they enter it."""
        for sequence in self.sequences.running:
            if self.sequences.epoch_of(sequence) == ring.epoch:
                self._turns.left(sequence)
                self.sequences.leave(sequence)
        self.sequences.leave_behind(ring.epoch)
        if ring is not self.ring:
            self._enter_waiting()
        self._answer_switches()

    def answer(self, sequence: int) -> Sequence[int]:
        """See RingEnd."""
        return self.sequences.answer(sequence)

    def linked(self, ring: EpochRing) -> None:
        """The epoch's links stand."""
        if ring is self.ring:
            self._enter_waiting()
            self._feed()

    def head_linked(self, ring: EpochRing) -> None:
        """The head can be told something now; what it waits for may have been lost."""
        for sequence in self.sequences.running:
            if self.sequences.epoch_of(sequence) == ring.epoch:
                self._tell_head(sequence)

    def unloaded(self, ring: EpochRing) -> None:
        """The epoch has ended here."""
        if ring is self.ring:
            self.ring = None
        self.broke(ring)

    # ---- entering an epoch ------------------------------------------------------------------------------------------

    def _move(self, at_once: bool = False) -> None:
        """Sequences of other epochs change to the present one, if nothing of them is under way, or `at_once`."""
        source, here = self.sequences, None if self.ring is None else self.ring.epoch
        for sequence in source.running if here is not None else ():
            if source.epoch_of(sequence) not in (None, here) and (at_once or not source.is_under_way(sequence)):
                source.leave(sequence)
        self._enter_waiting()
        self._answer_switches()

    def _enter_waiting(self) -> None:
        """Sequences that are in no epoch enter the present one, if it stands."""
        for sequence in self.sequences.running:
            ring = self.ring
            if ring is None or not ring.stands:
                return
            if self.sequences.epoch_of(sequence) is not None:
                continue
            if self.sequences.fits(sequence):
                self._fed_at = self._clock()
                self._send(ring, *self.sequences.enter(sequence))
            else:
                self._finish(sequence, "error", "the new plan has too little room for this answer")

    def _opened(self, ring: EpochRing, opened: Opened) -> None:
        """What the stages lack of a sequence is known: it is fed again from where all of them can go on."""
        try:
            again = self.sequences.came_round(opened)
        except FrameError as error:
            self._finish(opened.sequence, "error", str(error))
            return
        if again is not None:
            self._turns.left(opened.sequence)
            self._send(ring, *again)

    def _send(self, ring: EpochRing, opened: Opened, step: TokenRun | None) -> None:
        """What breaks or comes back within `give` finds the sequence as it is after it."""
        if step is not None:
            self._turns.due(step)
        if penalises(opened.sampling) and ring.count - 1 not in ring.stages:
            opened = replace(opened, answer=tuple(self.sequences.answer(opened.sequence)))
        ring.give(0, opened)

    def _answer_switches(self) -> None:
        """Done, once no sequence is in an epoch that was left."""
        here = (None, None if self.ring is None else self.ring.epoch)
        if self._switches and all(self.sequences.epoch_of(one) in here for one in self.sequences.running):
            for message in self._switches:
                self._tell(Done(message.request))
            self._switches.clear()

    # ---- feeding ----------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        """Feed the first stage whatever may enter it now."""
        ring, source = self.ring, self.sequences
        if ring is None:
            return
        for steps in self._turns.steps(source.prompting, source.prompts_under_way):
            ring.give(0, TokenBatch(steps, source.ids(steps)))
            self._tell_head(*[step.sequence for step in steps if step.masked])
        for chunk in source.feed(self._turns.chunks(source.prompts_under_way)):
            ring.give(0, TokenBatch([chunk], source.ids([chunk])))
            if chunk.masked:
                self._tell_head(chunk.sequence)

    def _tell_head(self, *sequences: int) -> None:
        """What is known already of the masks that the head needs for what was fed."""
        for sequence in sequences:
            masked, ring = self.sequences.due_mask(sequence), self._rings.get(self.sequences.epoch_of(sequence) or 0)
            if masked is not None and ring is not None:
                ring.tell_head(masked)

    def _end_masks(self, sequence: int) -> None:
        if self._masks is not None:
            self._masks.end((self._id, sequence))

    def _came_back(
        self, ring: EpochRing, run: TokenRun, token: int | None, vector: Floats | None, logprobs: bytes
    ) -> None:
        sequence, source = run.sequence, self.sequences
        if source.epoch_of(sequence) != ring.epoch or source.is_late(run):
            self._counts.dropped_frames += 1
            return
        try:
            step, tokens = source.came_back(run, token, vector, logprobs)
        except FrameError as error:
            self._finish(sequence, "error", str(error))
            return
        self._turns.left(sequence)
        if tokens is not None:
            self._tell(tokens)
        if run.masked and token is not None and sequence in source.running and self._masks is not None:
            self._masks.advance((self._id, sequence), token)
        if sequence not in source.running:
            self._end_masks(sequence)
            ring.give(0, Released(sequence, run.slot, keep=source.kept(run.slot)))
        elif step is not None and ring is self.ring:
            self._turns.due(step)
        elif step is not None:
            source.leave(sequence)  # it is due in the epoch that it changes to

    def _finish(self, sequence: int, finish: FinishReason, error: str = "") -> None:
        source = self.sequences
        slot, epoch = source.slot(sequence), source.epoch_of(sequence)
        self._turns.left(sequence)
        self._end_masks(sequence)
        tokens = source.end(sequence, finish, error)
        if tokens is not None:
            self._tell(tokens)
        for ring in [ring for ring in self._rings.values() if epoch in (None, ring.epoch) and 0 in ring.stages]:
            ring.give(0, Released(sequence, slot, keep=source.kept(slot)))

    def _note_return(self, ring: EpochRing) -> None:
        now = self._clock()
        self._longest_s = max(KEPT * self._longest_s, now - self._fed_at)
        self._fed_at = now
        if ring is not self.ring:
            self._old_at = now


def _finish_of(order: Submit, context: int) -> FinishReason | None:
    """How an answer that is known already has ended, if it has."""
    if not order.answer:
        return None
    if order.answer[-1] in order.stop_ids:
        return "stop"
    whole = len(order.answer) >= order.max_tokens or len(order.prompt) + len(order.answer) > context
    return "length" if whole else None
