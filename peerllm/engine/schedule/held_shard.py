"""A loaded shard, known by what it holds, and the slots of the sequences in it. Stages of several epochs may use it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from peerllm.engine.base import Shard
from peerllm.engine.messages import LoadStage
from peerllm.engine.state.slot_table import SlotTable
from peerllm.engine.wire.state_frames import CarriedPart
from peerllm.errors import EngineError, PeerLLMError
from peerllm.reused_layers import Layers, reused

Form = tuple[str, str, str, int, int]  # config, dtype, quantize, slots, context


def form_of(spec: LoadStage) -> Form:
    """What shards of a deployment must have in common to belong to one stage."""
    return spec.config, spec.dtype, spec.quantize, spec.slots, spec.context


@dataclass(frozen=True, slots=True, eq=False)
class HeldShard:
    """Layers first..last of a deployment's model, in one form."""

    first_layer: int
    last_layer: int
    form: Form
    shard: Shard
    slots: SlotTable
    arriving: dict[int, int] = field(default_factory=dict)  # by slot: the sequence whose state is carried here

    @classmethod
    def of(cls, spec: LoadStage, shard: Shard) -> HeldShard:
        """The shard that was loaded for `spec`."""
        slots = SlotTable(spec.slots, spec.context, shard.reach)
        return cls(spec.first_layer, spec.last_layer, form_of(spec), shard, slots)

    def take_part(self, carried: CarriedPart) -> None:
        """Take in a part of the state of a sequence that another stage still computes.

        EngineError if its slot is in use, BadInputError if the part does not fit; then nothing is left of its state.
        """
        sequence, slot = carried.sequence, carried.slot
        if self.slots.taken(slot):
            raise EngineError(f"slot {slot} is in use")
        if self.arriving.get(slot) != sequence:
            self.forget(slot)
        try:
            self.shard.import_part(slot, carried.part)
        except PeerLLMError:
            self.forget(slot)
            raise
        self.arriving[slot] = sequence

    def take_over(self, sequence: int, slot: int, epoch: int, position: int, others: Iterable[HeldShard]) -> None:
        """A sequence enters an epoch in a slot: what was carried here of it is its own, another's is forgotten.

        So is what `others` on this device, which had these layers before, have of its first `position` tokens.
        """
        if position and not self.slots.taken(slot):
            for one in others:
                if one is not self and one.form == self.form and one.slots.holds(sequence, slot):
                    self._copy(one, sequence, slot, position)
        if self.arriving.get(slot) == sequence:
            del self.arriving[slot]
            tokens, furthest = self.shard.settle(slot)
            if tokens:
                self.slots.adopt(sequence, slot, epoch, tokens, furthest, self.shard.steady(slot))
        elif slot in self.arriving:
            self.forget(slot)

    def _copy(self, one: HeldShard, sequence: int, slot: int, position: int) -> None:
        mine, theirs = (shard.state_forms(self.first_layer, self.last_layer) for shard in (self.shard, one.shard))
        with suppress(PeerLLMError):  # then it is computed again
            for block in mine.tokens.keys() & theirs.tokens.keys():
                held = one.shard.held(slot, block)
                stop = min(position, held.stop)
                if held.start < stop:
                    part = one.shard.export_part(slot, block, held.start, stop)
                    self.take_part(CarriedPart(sequence, slot, part))
            # Layers that know the last position alone take their snapshot along: other stages may lack what follows it.
            for place in sorted({one.shard.steady(slot), position}):
                for block in mine.fixed.keys() & theirs.fixed.keys() if 0 < place <= position else ():
                    part = one.shard.export_fixed(slot, block, place)
                    self.take_part(CarriedPart(sequence, slot, part))

    def forget(self, slot: int) -> None:
        """Drop what was carried here for a slot."""
        self.arriving.pop(slot, None)
        self.shard.release(slot)


def chain_of(held: Iterable[HeldShard], spec: LoadStage) -> tuple[list[HeldShard], list[Layers]]:
    """(shards that can be part of `spec`'s stage, runs of its layers that none of them has), by first layer."""
    fitting = {(one.first_layer, one.last_layer): one for one in held if one.form == form_of(spec)}
    used, missing = reused((spec.first_layer, spec.last_layer), fitting)
    return [fitting[layers] for layers in used], missing


def held_bytes(shards: Iterable[HeldShard]) -> int:
    """Weights and KV; what two of them share counts once."""
    every = {id(one): one.shard for one in shards}.values()
    weights = {key: nbytes for shard in every for key, nbytes in shard.weights.items()}
    return sum(weights.values()) + sum(shard.kv_bytes for shard in every)
