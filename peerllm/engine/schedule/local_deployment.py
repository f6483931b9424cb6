"""One deployment on this engine: its loaded shards, the epochs whose stages use them, and on the source its sequences.

Compute thread only. What the daemon shall hear goes to `tell`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from peerllm.engine.masks.mask_maker import MadeMask, MaskMaker
from peerllm.engine.messages import FromEngine, Submit, Switch
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import EpochRing, RingCounts, StageKey
from peerllm.engine.schedule.held_shard import HeldShard, held_bytes
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.source_feed import SourceFeed
from peerllm.engine.wire.parcels import Parcel
from peerllm.engine.wire.state_frames import CarriedPart
from peerllm.errors import BadInputError, PeerLLMError, RefusedError
from peerllm.transport.links.link import Link
from peerllm.types import DeploymentId


class LocalDeployment:
    """Several epochs may stand side by side; a shard is loaded once, however many of them use it."""

    def __init__(
        self,
        identity: DeploymentId,
        schedule: Scheduler[StageKey],
        tell: Callable[[FromEngine], None],
        counts: RingCounts | None = None,
        masks: MaskMaker | None = None,
    ) -> None:
        """`masks` makes those of constrained answers."""
        self.id, self.rings = identity, dict[int, EpochRing]()
        self.feed: SourceFeed | None = None  # on the source
        self._schedule, self._tell, self._counts, self._masks = schedule, tell, counts or RingCounts(), masks

    @property
    def shards(self) -> tuple[HeldShard, ...]:
        """What is loaded, each once."""
        chains = (stage.chain for ring in self.rings.values() for stage in ring.stages.values())
        return tuple({id(one): one for chain in chains for one in chain}.values())

    @property
    def held_bytes(self) -> int:
        """Weights and KV of its shards; what two of them share counts once."""
        return held_bytes(self.shards)

    def loaded(self, stage: LoadedStage) -> None:
        """A stage of an epoch is loaded. RefusedError if that cannot be."""
        spec = stage.spec
        if any(epoch > spec.epoch for epoch in self.rings):
            raise RefusedError(f"epoch {spec.epoch} is past")
        ring = self.rings.get(spec.epoch)
        if ring is not None and spec.stage in ring.stages:
            raise RefusedError(f"stage {spec.stage} is loaded already; unload it first")
        if ring is None:
            about = self._schedule, self._tell, self._counts, self._void, lambda: self.shards
            ring = self.rings[spec.epoch] = EpochRing(spec, *about)
        ring.loaded(stage)
        if spec.stage == 0:
            self._take_in(ring)

    def linked(self, epoch: int, outlets: Mapping[int, Link]) -> None:
        """The links of an epoch stand. If one had been lost before, what was under way on it is gone."""
        ring = self.rings[epoch]
        ring.linked(outlets)
        if self.feed is not None:
            self.feed.linked(ring)

    def arrived(self, epoch: int, stage: int, parcels: Sequence[Parcel]) -> None:
        """A frame of an epoch brought these; it is dropped if that is not loaded any more."""
        ring = self.rings.get(epoch)
        if ring is not None:
            ring.arrived(stage, parcels)

    def head_linked(self, epoch: int, link: Link) -> None:
        """The head of an epoch, on another device, has dialled this one, which is its source."""
        ring = self.rings.get(epoch)
        if ring is not None:
            ring.head_linked(link)
            if self.feed is not None:
                self.feed.head_linked(ring)

    def state_came(self, epoch: int, stage: int, carried: CarriedPart) -> None:
        """A part of a sequence's state came for a stage of an epoch; it is dropped if it is of no use there."""
        try:
            self.rings[epoch].stages[stage].take_part(carried)
        except (KeyError, PeerLLMError):
            self._counts.dropped_frames += 1

    def unload(self, epoch: int, only: bool = False) -> None:
        """End the epochs up to this one, or this one alone, and free the shards that no other uses.

        There must be another.
        """
        before = self.shards
        over = [one for one in sorted(self.rings) if (one == epoch if only else one <= epoch)]
        ended = [self.rings.pop(one) for one in over]
        for ring in ended:
            ring.close()
            if self.feed is not None:
                self.feed.unloaded(ring)
        _free(set(before) - set(self.shards))

    def close(self, reason: str) -> None:
        """End all sequences and free the shards."""
        shards = self.shards
        if self.feed is not None:
            self.feed.close(reason)
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        _free(shards)

    # ---- on the source ----------------------------------------------------------------------------------------------

    def submit(self, order: Submit) -> None:
        """Start a sequence. BadInputError if this is not the source; other reasons are told as its end."""
        if self.feed is None:
            raise BadInputError("sequences start on the device that holds the embedding; this one does not")
        self.feed.submit(order)

    def mask_made(self, made: MadeMask) -> None:
        """A constrained answer's next mask is there."""
        if self.feed is not None:
            self.feed.mask_made(made)

    def cancel(self, sequence: int) -> None:
        if self.feed is not None:
            self.feed.cancel(sequence)

    def switch(self, message: Switch) -> None:
        """RefusedError if this is not the source; the rest is told."""
        if self.feed is None:
            raise RefusedError("sequences change their epoch on the source, and this device is none")
        self.feed.switch(message)

    def hurry(self) -> None:
        """Time has passed in which an epoch that is being left may have brought nothing back."""
        if self.feed is not None:
            self.feed.hurry()

    def _take_in(self, ring: EpochRing) -> None:
        """The first stage of an epoch is here. Without another epoch, sequences are fed in it at once."""
        if self.feed is None:
            self.feed = SourceFeed(ring, self.rings, self._tell, self._counts, masks=self._masks)
        ring.end = self.feed
        if self.feed.ring is None:
            self.feed.feed_in(ring)

    def _void(self, sequence: int, stage: LoadedStage) -> None:
        for ring in self.rings.values():
            ring.void(sequence, stage)


def _free(shards: Iterable[HeldShard]) -> None:
    for one in shards:
        one.shard.close()
