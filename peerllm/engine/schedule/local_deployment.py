"""One deployment on this engine: the parcels of its sequences, moved between its stages, its links and its source.

Compute thread only. What leaves the device goes to a Link, what the daemon shall hear to `tell`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from peerllm.engine.messages import FinishReason, FromEngine, LinkLost, LoadStage, Submit, Tokens
from peerllm.engine.schedule.batching import Piece, Scheduler
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.source_sequences import SourceSequences, window_tokens
from peerllm.engine.schedule.step_schedules import SCHEDULES, NoBubble
from peerllm.engine.wire.parcels import (
    ALL_SEQUENCES,
    DTYPES,
    Activation,
    Drawn,
    Opened,
    Parcel,
    Released,
    lengthen,
    shorten,
    split,
    to_frame,
)
from peerllm.errors import BadInputError, FrameError, LinkError, PeerLLMError
from peerllm.transport.links import Link
from peerllm.types import DeploymentId, DeviceId

StageKey = tuple[DeploymentId, int]
NOT_FINITE = "the model computed hidden states that are no finite numbers; try --exact"


class LocalDeployment:
    """Stages of one epoch; `loaded` adds them one by one, `linked` opens the way to other devices."""

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
            reach = stage.shard.reach
            self._source = SourceSequences(self.id, spec.slots, spec.context, spec.chunk, spec.stages, reach, spec.cuts)

    @property
    def held_bytes(self) -> int:
        """Weights and KV of its stages here; what two of them share counts once."""
        shards = [stage.shard for stage in self.stages.values()]
        weights = {key: nbytes for shard in shards for key, nbytes in shard.weights.items()}
        return sum(weights.values()) + sum(shard.kv_bytes for shard in shards)

    def linked(self, outlets: Mapping[int, Link]) -> None:
        """The links stand; if some broke before, whatever was under way on them is gone."""
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
        """Starts a sequence; why it cannot start is told as its end."""
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
        self._go_on(self._source)

    def cancel(self, sequence: int) -> None:
        if self._source is not None and sequence in self._source.running:
            self._finish(self._source, sequence, "cancelled")
            self._go_on(self._source)

    def _go_on(self, source: SourceSequences) -> None:
        """Whatever may enter the first stage now does."""
        for batch in self._turns.steps(source.prompting, source.prompts_under_way):
            self._take_in(0, batch)
        for chunk in source.feed(self._turns.chunks(source.prompts_under_way)):
            self._take_in(0, (chunk,))

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
            self.breaks("the plan ends on this device, which is not its source")
            return
        match parcel:
            case Drawn(pieces, drawn):
                for piece, token in zip(pieces, drawn, strict=True):
                    self._came_back(source, piece, token)
                self._go_on(source)
            case Released(sequence, _, reason) if sequence == ALL_SEQUENCES:
                self.breaks(reason or "a later stage lost its link")
            case Released(sequence, _, reason):
                if not reason:
                    source.drained(sequence)
                elif sequence in source.running:
                    self._finish(source, sequence, "error", reason)
                else:  # it failed after the source had ended it: not every stage keeps what it left
                    source.forget(sequence)
                self._go_on(source)
            case _:
                raise FrameError("only tokens and releases go back to the source")

    def _came_back(self, source: SourceSequences, piece: Piece, token: int | None) -> None:
        try:
            feed, tokens = source.came_back(piece.sequence, piece.position, piece.length, token)
        except FrameError as error:
            self._finish(source, piece.sequence, "error", str(error))
            return
        self._turns.left(piece.sequence)
        if feed is not None:
            self._turns.due(feed)
        if tokens is not None:
            self._tell(tokens)
            if tokens.finish is not None:
                self._arrive(0, Released(piece.sequence, piece.slot, keep=source.kept(piece.slot)))

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
            self.breaks(f"stage {index} is not loaded on this device")
            return
        match parcel:
            case Activation():
                whole = parcel if parcel.scales is None else lengthen(parcel, DTYPES[stage.spec.dtype])
                self._take_in(index, split(whole))
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

    def _take_in(self, index: int, pieces: Sequence[Piece]) -> None:
        """What came together waits together."""
        stage, key = self.stages[index], (self.id, index)
        waiting, taken = self._schedule.waiting(key), list[Piece]()
        for piece in pieces:
            if piece.sequence not in stage.slots:  # released meanwhile
                continue
            try:
                stage.slots.extend(piece.sequence, piece.slot, piece.position, piece.length)
                if waiting + piece.length > self._most_waiting:
                    raise FrameError(f"more than {self._most_waiting} tokens wait")
            except FrameError as error:
                self.fail(index, piece, f"stage {index}: {error}")
            else:
                taken.append(piece)
                waiting += piece.length
        self._schedule.put(key, *(piece for piece in taken if piece.sequence in stage.slots))  # a failure may end all

    def computed(self, index: int, result: Activation | Drawn) -> None:
        """A stage's result, on its way."""
        if isinstance(result, Activation) and self.stages[index].spec.downstream_activations == "int8":
            parcel, lost = shorten(result)
            for piece in lost:
                self.fail(index, piece, f"stage {index}: {NOT_FINITE}")
            if parcel is not None:
                self._pass_on(index, parcel)
        else:
            self._pass_on(index, result)

    def fail(self, index: int, piece: Piece, reason: str) -> None:
        """A sequence cannot go on at this stage: the stages after it let go, and the source hears why."""
        self._free(self.stages[index], index, piece.sequence)
        self._pass_on(index, Released(piece.sequence, piece.slot, reason))

    def _free(self, stage: LoadedStage, index: int, sequence: int, keep: int = 0) -> None:
        if stage.release(sequence, keep):
            self._schedule.drop((self.id, index), sequence)

    def _pass_on(self, index: int, parcel: Parcel) -> None:
        if self.stages[index].spec.downstream is None:
            self._arrive(index + 1, parcel)
            return
        outlet = self._outlets.get(index)
        if outlet is None:
            self.breaks(f"stage {index} has no link to the next yet")
            return
        try:
            outlet.send(to_frame(parcel, self.id, self.epoch, index + 1))
        except LinkError as error:
            self.lost(outlet.device, None, str(error))

    # ---- breaking and ending ----------------------------------------------------------------------------------------

    def breaks(self, reason: str) -> None:
        """A link is gone: on the source every sequence ends; elsewhere those after the break pass the word round."""
        if self.broken:
            return
        self.broken = reason
        if self._source is not None:
            for sequence in self._source.running:
                self._finish(self._source, sequence, "error", reason)

    def lost(self, device: DeviceId, ingress: int | None, reason: str) -> None:
        """The link to `device` is gone; or the one from it that fed stage `ingress`: all up to the source hear it."""
        if device not in self._reported:
            self._reported.add(device)
            self._tell(LinkLost(self.id, device, reason))
        reason = f"lost the link with device {device[:8]}: {reason}"
        if ingress is not None and ingress in self.stages:
            self._arrive(ingress, Released(ALL_SEQUENCES, 0, reason))
        self.breaks(reason)

    def _drop_all(self, *indexes: int) -> None:
        for index in indexes or tuple(self.stages):
            stage = self.stages[index]
            for sequence in stage.slots.sequences:
                self._free(stage, index, sequence)
            stage.empty()

    def close(self, reason: str) -> None:
        """Ends all sequences and frees the shards."""
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
