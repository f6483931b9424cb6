"""A loaded shard, known by what it holds, and the slots of the sequences in it. Stages of several epochs may use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peerllm.engine.base import Shard
from peerllm.engine.messages import LoadStage
from peerllm.engine.state.slot_table import SlotTable

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

    @classmethod
    def of(cls, spec: LoadStage, shard: Shard) -> HeldShard:
        """The shard that was loaded for `spec`."""
        slots = SlotTable(spec.slots, spec.context, shard.reach)
        return cls(spec.first_layer, spec.last_layer, form_of(spec), shard, slots)


def usable(held: Iterable[HeldShard], spec: LoadStage) -> list[HeldShard]:
    """Those that can be part of `spec`'s stage, in the order of their layers, none of them overlapping."""
    chain: list[HeldShard] = []
    inside = (one for one in held if one.form == form_of(spec) and _is_inside(one, spec))
    for one in sorted(inside, key=lambda one: (one.first_layer, -one.last_layer)):
        if not chain or one.first_layer > chain[-1].last_layer:
            chain.append(one)
    return chain


def missing(chain: Sequence[HeldShard], spec: LoadStage) -> list[tuple[int, int]]:
    """(first, last) of each run of `spec`'s layers that no shard of the chain has."""
    firsts = [spec.first_layer, *(one.last_layer + 1 for one in chain)]
    lasts = [*(one.first_layer - 1 for one in chain), spec.last_layer]
    return [(first, last) for first, last in zip(firsts, lasts, strict=True) if first <= last]


def held_bytes(shards: Iterable[HeldShard]) -> int:
    """Weights and KV; what two of them share counts once."""
    every = {id(one): one.shard for one in shards}.values()
    weights = {key: nbytes for shard in every for key, nbytes in shard.weights.items()}
    return sum(weights.values()) + sum(shard.kv_bytes for shard in every)


def _is_inside(one: HeldShard, spec: LoadStage) -> bool:
    return spec.first_layer <= one.first_layer and one.last_layer <= spec.last_layer
