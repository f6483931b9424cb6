"""One deployment on this engine: moves what its sequences need between its stages, its links and its source.

Compute thread only. What leaves the device goes to a Link, what the daemon shall hear goes to `tell`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peerllm.engine.messages import FinishReason, FromEngine, LinkLost, LoadStage, Submit, Tokens
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.loaded_stage import Failures, LoadedStage
from peerllm.engine.schedule.source_sequences import SourceSequences, window_tokens
from peerllm.engine.schedule.step_schedules import SCHEDULES, NoBubble
from peerllm.engine.wire.parcels import (
    ALL_SEQUENCES,
    DTYPES,
    Drawn,
    Opened,
    Parcel,
    Released,
    TokenBatch,
    dequantised,
    to_frame,
)
from peerllm.errors import BadInputError, FrameError, LinkError, PeerLLMError, one_line
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.link import Link
from peerllm.types import DeploymentId, DeviceId

StageKey = tuple[DeploymentId, int]


class LocalDeployment:
    """The stages of one epoch here: `loaded` adds them one by one, `linked` sets their links to other devices."""

    def __init__(self, spec: LoadStage, schedule: Scheduler[StageKey], tell: Callable[[FromEngine], None]) -> None:
        self.id, self.epoch, self.count = spec.deployment, spec.epoch, spec.stages
        self.stages: dict[int, LoadedStage] = {}
        self._most_waiting = window_tokens(spec.stages, spec.chunk) + spec.slots  # at one stage, by the source's window
        self._schedule, self._tell = schedule, tell
        self._outlets: dict[int, Link] = {}  # by the stage that sends
        self._source: SourceSequences | None = None
        self._turns: NoBubble = SCHEDULES[spec.schedule](spec.micro_batch, spec.micro_batches)  # on the source
        self.broken = ""  # why sequences cannot run until the links are made anew
        self._reported: set[DeviceId] = set()  # told to the daemon as lost

    def loaded(self, stage: LoadedStage) -> None:
        spec = stage.spec
        self.stages[spec.stage] = stage
        self._schedule.add((self.id, spec.stage), self.id, spec.stage)
        if spec.stage == 0:
            sizes = spec.slots, spec.context, spec.chunk, spec.stages, stage.shard.vocabulary
            self._source = SourceSequences(self.id, *sizes, stage.shard.reach, spec.cuts)

    @property
    def held_bytes(self) -> int:
        """Weights and KV of its stages here; what two of them share counts once."""
        shards = [stage.shard for stage in self.stages.values()]
        weights = {key: nbytes for shard in shards for key, nbytes in shard.weights.items()}
        return sum(weights.values()) + sum(shard.kv_bytes for shard in shards)

    def linked(self, outlets: Mapping[int, Link]) -> None:
        """The links stand. If one had broken before, every sequence is dropped: what was under way on it is gone."""
        self._outlets = dict(outlets)
        self._reported.clear()
        if not self.broken:
            return
        self.broken = ""
        self._drop_all()
        if self._source is not None:
            self._source.reset()

    # ---- on the source ----------------------------------------------------------------------------------------------

    def submit(self, order: Submit) -> None:
        """Start a sequence. If it cannot start, its end is told with the reason."""
        try:
            if self._source is None:
                raise BadInputError("sequences start on the device that holds the embedding; this one does not")
            if self.broken:
                raise LinkError(self.broken)
            slot = self._source.submit(order)
        except PeerLLMError as error:
            self._tell(Tokens(self.id, order.sequence, 0, (), "error", str(error)))
            return
        self._arrive(0, Opened(order.sequence, slot, order.sampling, self._source.reused(order.sequence)))
        self._feed(self._source)

    def cancel(self, sequence: int) -> None:
        if self._source is not None and sequence in self._source.running:
            self._finish(self._source, sequence, "cancelled")
            self._feed(self._source)

    def _feed(self, source: SourceSequences) -> None:
        """Feed the first stage whatever may enter it now."""
        for steps in self._turns.steps(source.prompting, source.prompts_under_way):
            self._enqueue(0, TokenBatch(steps, source.ids(steps)))
        for chunk in source.feed(self._turns.chunks(source.prompts_under_way)):
            self._enqueue(0, TokenBatch([chunk], source.ids([chunk])))

    def _finish(self, source: SourceSequences, sequence: int, finish: FinishReason, error: str = "") -> None:
        slot = source.slot(sequence)
        self._turns.left(sequence)
        tokens = source.end(sequence, finish, error)
        if tokens is not None:
            self._tell(tokens)
        self._arrive(0, Released(sequence, slot, keep=source.kept(slot)))

    def _at_source(self, parcel: Parcel) -> None:
        source = self._source
        if source is None:
            self.interrupt("the plan ends on this device, which is not its source")
            return
        match parcel:
            case Drawn(runs, drawn):
                for run, token in zip(runs, drawn, strict=True):
                    self._came_back(source, run, token)
                self._feed(source)
            case Released(sequence, _, reason) if sequence == ALL_SEQUENCES:
                self.interrupt(reason or "a later stage lost its link")
            case Released(sequence, _, reason):
                if not reason:
                    source.drained(sequence)
                elif sequence in source.running:
                    self._finish(source, sequence, "error", reason)
                else:  # it failed after the source had ended it: not every stage keeps what it left
                    source.forget(sequence)
                self._feed(source)
            case _:
                raise FrameError("only tokens and releases go back to the source")

    def _came_back(self, source: SourceSequences, run: TokenRun, token: int | None) -> None:
        try:
            step, tokens = source.came_back(run, token)
        except FrameError as error:
            self._finish(source, run.sequence, "error", str(error))
            return
        self._turns.left(run.sequence)
        if step is not None:
            self._turns.due(step)
        if tokens is not None:
            self._tell(tokens)
            if tokens.finish is not None:
                self._arrive(0, Released(run.sequence, run.slot, keep=source.kept(run.slot)))

    # ---- between stages ---------------------------------------------------------------------------------------------

    def arrived(self, stage: int, parcels: Sequence[Parcel]) -> None:
        """A frame of this epoch brought these for `stage`."""
        for parcel in parcels:
            self._arrive(stage, parcel)

    def _arrive(self, index: int, parcel: Parcel) -> None:
        if index == self.count:
            self._at_source(parcel)
            return
        stage = self.stages.get(index)
        if stage is None:
            self.interrupt(f"stage {index} is not loaded on this device")
            return
        match parcel:
            case TokenBatch():
                self._enqueue(index, dequantised(parcel, DTYPES[stage.spec.dtype]))
            case Opened(sequence, slot):
                try:
                    stage.open(parcel)
                except FrameError as error:
                    self._pass_on(index, Released(sequence, slot, str(error)))
                else:
                    if not stage.is_head:
                        self._pass_on(index, parcel)
            case Released(sequence) if sequence == ALL_SEQUENCES:
                self._drop_all(index)
                self._pass_on(index, parcel)
            case Released(sequence, _, reason, keep):
                self._free(stage, index, sequence, 0 if reason else keep)
                self._pass_on(index, parcel)
            case Drawn():
                raise FrameError("tokens go to the source only")

    def _enqueue(self, index: int, batch: TokenBatch) -> None:
        """Check runs that came together against the slots they name, and queue the sound ones together."""
        stage, key = self.stages[index], (self.id, index)
        waiting, taken = self._schedule.waiting(key), list[TokenRun]()
        for run in batch.runs:
            if run.sequence not in stage.slots:  # released meanwhile
                continue
            try:
                stage.slots.extend(run)
                if waiting + run.length > self._most_waiting:
                    raise FrameError(f"more than {self._most_waiting} tokens wait")
            except FrameError as error:
                self.fail(index, run, str(error))
            else:
                taken.append(run)
                waiting += run.length
        taken = [run for run in taken if run.sequence in stage.slots]  # one that failed may have ended all
        if taken:
            self._schedule.put(key, batch.only(taken))

    def computed(self, index: int, result: TokenBatch | Drawn | None, failed: Failures) -> None:
        """Hand on what a stage computed; the sequences that failed there end."""
        for run, reason in failed:
            self.fail(index, run, reason)
        if result is not None:
            self._pass_on(index, result)

    def fail(self, index: int, run: TokenRun, reason: str) -> None:
        """A sequence cannot go on at a stage: later stages release its slot, and the source hears why."""
        self._arrive(index, Released(run.sequence, run.slot, f"stage {index}: {reason}"))

    def _free(self, stage: LoadedStage, index: int, sequence: int, keep: int = 0) -> None:
        if stage.release(sequence, keep):
            self._schedule.drop((self.id, index), sequence)

    def _pass_on(self, index: int, parcel: Parcel) -> None:
        if self.stages[index].spec.downstream is None:
            self._arrive(index + 1, parcel)
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
        """A link is gone: on the source every sequence ends. Other devices wait for the links to be made anew."""
        if self.broken:
            return
        self.broken = reason
        if self._source is not None:
            for sequence in self._source.running:
                self._finish(self._source, sequence, "error", reason)

    def lost(self, device: DeviceId, ingress: int | None, reason: str) -> None:
        """The link to `device` is gone, or with `ingress` the one from it that fed that stage.

        The daemon hears of it, and so do the stages after `ingress` up to the source.
        """
        if device not in self._reported:
            self._reported.add(device)
            self._tell(LinkLost(self.id, device, reason))
        reason = f"lost the link with device {device[:8]}: {reason}"
        if ingress is not None and ingress in self.stages:
            self._arrive(ingress, Released(ALL_SEQUENCES, 0, reason))
        self.interrupt(reason)

    def _drop_all(self, *indexes: int) -> None:
        for index in indexes or tuple(self.stages):
            stage = self.stages[index]
            for sequence in stage.slots.sequences:
                self._free(stage, index, sequence)
            stage.empty()

    def close(self, reason: str) -> None:
        """End all sequences and free the shards."""
        self.broken = self.broken or reason
        if self._source is not None:
            for sequence in self._source.running:
                tokens = self._source.end(sequence, "error", reason)
                if tokens is not None:
                    self._tell(tokens)
        for index, stage in self.stages.items():
            self._schedule.remove((self.id, index))
            stage.close()
        self.stages.clear()
