"""The stages of one epoch on this engine, and their links: moves what sequences need from stage to stage.

Compute thread only. What leaves the device goes to a Link, what reaches the end of the ring goes to its source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from peerllm.engine.messages import FromEngine, LinkLost, LoadStage
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import Failures, LoadedStage
from peerllm.engine.schedule.source_sequences import window_tokens
from peerllm.engine.wire.parcels import (
    ALL_SEQUENCES,
    DTYPES,
    Drawn,
    Masked,
    Opened,
    Parcel,
    Released,
    TokenBatch,
    dequantised,
    to_frame,
)
from peerllm.errors import FrameError, LinkError, one_line
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.link import Link
from peerllm.types import DeploymentId, DeviceId

StageKey = tuple[DeploymentId, int, int]  # deployment, epoch, stage


@dataclass(slots=True)
class RingCounts:
    """Of an engine since its start: what became of the tokens that came to its stages, and what it loaded."""

    replayed_tokens: int = 0  # computed again
    dropped_frames: int = 0  # runs and tokens that came late, twice, or of sequences that are not known
    loaded_layers: int = 0


class RingEnd(Protocol):
    """What is done with that which has gone round, on the source."""

    def came_round(self, ring: EpochRing, parcel: Parcel) -> None:
        """A parcel has passed the last stage."""
        ...

    def broke(self, ring: EpochRing) -> None:
        """Something was lost on the way: what is under way does not come back."""
        ...

    def answer(self, sequence: int) -> Sequence[int]:
        """A sequence's answer so far."""
        ...


class EpochRing:
    """`loaded` adds stages one by one, `linked` sets their links to other devices."""

    end: RingEnd | None = None  # on the source

    def __init__(
        self,
        spec: LoadStage,
        schedule: Scheduler[StageKey],
        tell: Callable[[FromEngine], None],
        counts: RingCounts,
        void: Callable[[int, LoadedStage], None],
        shards: Callable[[], Sequence[HeldShard]],
    ) -> None:
        """`void` forgets what waits of a sequence for a stage's shards, in any epoch; `shards` are all here."""
        self.id, self.epoch, self.count = spec.deployment, spec.epoch, spec.stages
        self.stages: dict[int, LoadedStage] = {}
        self.broken = ""  # why what is under way is lost, until the links are made anew
        self._most_waiting = window_tokens(spec.stages, spec.chunk) + spec.slots  # at one stage, by the source's window
        self._schedule, self._tell, self._counts, self._void = schedule, tell, counts, void
        self._shards = shards
        self._outlets: dict[int, Link] = {}  # by the stage that sends
        self._way_back: Link | None = None  # from the head on another device, which can also be told something on it
        self._reported: set[DeviceId] = set()  # told to the daemon as lost

    @property
    def stands(self) -> bool:
        """Whether sequences can go round, as far as is known here."""
        linked = all(stage.spec.downstream is None or index in self._outlets for index, stage in self.stages.items())
        return linked and not self.broken

    def loaded(self, stage: LoadedStage) -> None:
        index = stage.spec.stage
        self.stages[index] = stage
        self._schedule.add((self.id, self.epoch, index), self.id, index)

    def linked(self, outlets: Mapping[int, Link]) -> None:
        """The links stand. If one had been lost before, what was under way on it is gone."""
        self._outlets = dict(outlets)
        self._reported.clear()
        self.broken = ""

    def arrived(self, stage: int, parcels: Sequence[Parcel]) -> None:
        """A frame of this epoch brought these for `stage`."""
        for parcel in parcels:
            self.give(stage, parcel)

    def give(self, index: int, parcel: Parcel) -> None:
        """A parcel is at a stage; `count` stands for the source."""
        if index == self.count:
            if self.end is None:
                self.interrupt("the plan ends on this device, which is not its source")
            else:
                self.end.came_round(self, parcel)
            return
        stage = self.stages.get(index)
        if stage is None:
            self.interrupt(f"stage {index} is not loaded on this device")
            return
        match parcel:
            case TokenBatch():
                self._enqueue(stage, index, dequantised(parcel, DTYPES[stage.spec.dtype]))
            case Opened():
                self._open(stage, index, parcel)
            case Released(sequence) if sequence == ALL_SEQUENCES:
                self._pass_on(index, parcel)
            case Released(sequence, _, reason, keep):
                if stage.release(sequence, 0 if reason else keep):
                    self._schedule.drop((self.id, self.epoch, index), sequence)
                self._pass_on(index, parcel)
            case Masked():
                self.computed(index, *stage.masked(parcel))
            case Drawn(runs, tokens):
                if all(run.through >= 0 and token is None for run, token in zip(runs, tokens, strict=True)):
                    self._pass_on(index, parcel)
                else:
                    self._counts.dropped_frames += len(runs)

    def tell_head(self, masked: Masked) -> None:
        """To the stage that draws, past those between; if it cannot be told now, it is told when its link stands."""
        head = self.count - 1
        if head in self.stages:
            self.give(head, masked)
        elif self._way_back is not None:
            with suppress(LinkError):  # whoever reads the link tells that it is lost
                self._way_back.send(to_frame(masked, self.id, self.epoch, head))

    def head_linked(self, link: Link) -> None:
        """On the source: the head on another device has dialled."""
        self._way_back = link

    def computed(self, index: int, result: TokenBatch | Drawn | None, failed: Failures) -> None:
        """Hand on what a stage computed; the sequences that failed there end."""
        for run, reason in failed:
            self.fail(index, run, reason)
        if result is not None:
            if result.runs[0].through >= 0:
                self._counts.replayed_tokens += sum(run.length for run in result.runs)
            self._pass_on(index, result)

    def fail(self, index: int, run: TokenRun, reason: str) -> None:
        """A sequence cannot go on at a stage: later stages release its slot, and the source hears why."""
        self.give(index, Released(run.sequence, run.slot, f"stage {index}: {reason}"))

    def void(self, sequence: int, stage: LoadedStage) -> None:
        """Forget what waits of a sequence at stages here that use a shard of `stage`."""
        for index, own in self.stages.items():
            if not set(own.chain).isdisjoint(stage.chain):
                self._schedule.drop((self.id, self.epoch, index), sequence)

    # ---- between stages ---------------------------------------------------------------------------------------------

    def _open(self, stage: LoadedStage, index: int, opened: Opened) -> None:
        answer, standing = opened.answer, stage.standing(opened.sequence, opened.slot)
        if stage.is_head and self.end is not None:
            answer = self.end.answer(opened.sequence)
        try:
            passed = stage.open(opened, answer, self._shards())
        except FrameError as error:
            self._pass_on(index, Released(opened.sequence, opened.slot, str(error)))
            return
        if passed is None:
            self._counts.dropped_frames += 1
            return
        for sequence in standing:
            self._void(sequence, stage)
        self._pass_on(index, replace(passed, answer=()) if stage.is_head else passed)

    def _enqueue(self, stage: LoadedStage, index: int, batch: TokenBatch) -> None:
        """Check runs that came together against the slots they name, and queue the sound ones together."""
        key = self.id, self.epoch, index
        waiting, taken = self._schedule.waiting(key), list[TokenRun]()
        for run in batch.runs:
            try:
                if not stage.extend(run):
                    self._counts.dropped_frames += 1
                    continue
                if waiting + run.length > self._most_waiting:
                    raise FrameError(f"more than {self._most_waiting} tokens wait")
            except FrameError as error:
                self.fail(index, run, str(error))
            else:
                taken.append(run)
                waiting += run.length
        taken = [run for run in taken if run.sequence in stage]  # one that failed may have ended others
        if taken:
            self._schedule.put(key, batch.only(taken))

    def _pass_on(self, index: int, parcel: Parcel) -> None:
        if self.stages[index].spec.downstream is None:
            self.give(index + 1, parcel)
            return
        outlet = self._outlets.get(index)
        if outlet is None:
            self.interrupt(f"stage {index} has no link to the next yet")
            return
        try:
            outlet.send(to_frame(parcel, self.id, self.epoch, index + 1))
        except LinkError as error:
            self.lost(outlet.device, None, str(error))
        except Exception as error:
            if isinstance(parcel, TokenBatch | Drawn):  # whoever computed the batch ends its sequences
                raise
            self.lost(outlet.device, None, f"{type(error).__name__}: {one_line(error)}")

    # ---- breaking and ending ----------------------------------------------------------------------------------------

    def interrupt(self, reason: str) -> None:
        """What is under way is lost: sequences wait on the source for another epoch, or for new links."""
        if not self.broken:
            self.broken = reason
            if self.end is not None:
                self.end.broke(self)

    def lost(self, device: DeviceId, ingress: int | None, reason: str) -> None:
        """The link to `device` is gone, or with `ingress` the one from it that fed that stage.

        The daemon hears of it, and so do the stages after `ingress` up to the source.
        """
        if device not in self._reported:
            self._reported.add(device)
            self._tell(LinkLost(self.id, device, reason, self.epoch))
        reason = f"lost the link with device {device[:8]}: {reason}"
        if ingress is not None and ingress in self.stages:
            self.give(ingress, Released(ALL_SEQUENCES, 0, reason))
        self.interrupt(reason)

    def close(self) -> None:
        """Nothing of this epoch is computed here any more."""
        self.broken = self.broken or "the epoch has ended"
        for index in self.stages:
            self._schedule.remove((self.id, self.epoch, index))
