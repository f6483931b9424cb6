"""Carrying state in turns: what goes on meanwhile, what ends, how much a turn copies, and what a receiver lets in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from peerllm.engine.base import StateForms, StatePart
from peerllm.engine.messages import CarryState, Hop, LoadStage
from peerllm.engine.schedule.batching import Scheduler
from peerllm.engine.schedule.epoch_ring import RingCounts
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import LoadedStage
from peerllm.engine.schedule.local_deployment import LocalDeployment
from peerllm.engine.schedule.state_export import FEW_TOKENS, MAX_ROUNDS, TURN_BYTES, StateExport, parts_of
from peerllm.engine.state.arriving_state import state_forms
from peerllm.engine.state.kv_slots import KVSlots
from peerllm.engine.state.state_kinds import keys_and_values, reach_of
from peerllm.engine.wire.parcels import Opened
from peerllm.engine.wire.state_frames import PART_BYTES, CarriedPart
from peerllm.errors import EngineError, RefusedError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, stage

SLOTS, CONTEXT = 4, 512
WIDTH = 64


class Kept:
    """A shard that keeps each token's position in every number, and computes nothing."""

    form = "kept"
    weight_bytes = kv_bytes = 0
    hidden_size, vocabulary = 4, 9
    weights: Mapping[int, int] = MappingProxyType({})

    def __init__(self, first: int, last: int, width: int = WIDTH) -> None:
        self.states = {number: keys_and_values(2, width, "float32", 20 if number % 2 else None)
                       for number in range(first - 1, last)}  # fmt: skip
        self.slots = KVSlots(self.states, SLOTS, CONTEXT)
        self.reach = reach_of(self.states.values())

    def forward(self, inputs: Any, runs: Sequence[TokenRun]) -> Any:
        for run in (piece for whole in runs for piece in self.pieces(whole)):
            self.slots.check([run])
            batch = self.slots.seek([run])
            numbers = np.arange(run.position, run.position + run.length)[:, None]
            for group, last in zip(self.slots.groups.values(), batch.last, strict=True):
                for store in group.stores:
                    store[batch.first, :, last[0] + 1 - run.length : last[0] + 1] = numbers
            self.slots.advance([run])
        return inputs

    def pieces(self, run: TokenRun) -> list[TokenRun]:
        ends = range(run.position, run.position + run.length, self.slots.longest)
        last = run.position + run.length
        return [replace(run, position=at, length=min(self.slots.longest, last - at)) for at in ends]

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        return state_forms(self.states, [range(number - 1, number) for number in range(first_layer, last_layer + 1)])

    def held(self, slot: int, block: int) -> range:
        return self.slots.held(slot, block)

    def export_part(self, slot: int, block: int, start: int, stop: int) -> StatePart:
        return self.slots.part(slot, block, start, stop)

    def steady(self, slot: int) -> int:
        return self.slots.steady(slot)

    def export_fixed(self, slot: int, block: int, position: int) -> StatePart:
        return self.slots.fixed_part(slot, block, position)

    def import_part(self, slot: int, part: StatePart) -> None:
        self.slots.add(slot, part)

    def settle(self, slot: int) -> tuple[int, int]:
        return self.slots.settle(slot)

    def release(self, slot: int) -> None:
        self.slots.release(slot)

    def close(self) -> None:
        self.slots.close()


class Household:
    """A stage of epoch 1, and one of epoch 2 that is to go on with its sequences; on one engine or on two."""

    def __init__(self, width: int = WIDTH, layers: tuple[int, int] = (3, 4)) -> None:
        self.counts = RingCounts()
        self.old, self.new = (self.loaded(epoch, layers, width) for epoch in (1, 2))

    def loaded(self, epoch: int, layers: tuple[int, int], width: int) -> LocalDeployment:
        deployment = LocalDeployment(DEPLOYMENT, Scheduler(), lambda message: None, self.counts)
        deployment.loaded(staged(epoch, layers, width))
        return deployment

    @property
    def holder(self) -> LoadedStage:
        return self.old.rings[1].stages[1]

    @property
    def heir(self) -> LoadedStage:
        return self.new.rings[2].stages[1]

    def go(self, sequence: int, slot: int, count: int = 1) -> None:
        """`count` tokens more of a sequence."""
        start = next((held[2] for held in self.holder.chain[0].slots.holding(1) if held[0] == sequence), 0)
        if not start:
            self.holder.open(Opened(sequence, slot, Sampling()))
        run = TokenRun(sequence, slot, start, count)
        assert self.holder.extend(run)
        for one in self.holder.chain:
            one.shard.forward(np.zeros((count, 4), np.float32), [run])
            one.slots.computed(run)

    def carry(self, export: StateExport) -> int:
        """One turn: what the one hands out, the other takes in; its parts."""
        parts = export.turn(self.old)
        for carried in parts:
            self.new.state_came(2, 1, carried)
        return len(parts)

    def enters(self, sequence: int, slot: int, position: int) -> Opened:
        return self.heir.open(Opened(sequence, slot, Sampling(), position))


def staged(epoch: int, layers: tuple[int, int], width: int) -> LoadedStage:
    spec: LoadStage = stage(
        1, epoch=epoch, stage=1, stages=3, first_layer=layers[0], last_layer=layers[1], slots=SLOTS, context=CONTEXT,
        chunk=CONTEXT,
    )  # fmt: skip
    shard: Any = Kept(*layers, width)
    return LoadedStage(spec, [HeldShard.of(spec, shard)], lambda logits, draws: [])


def order(first: int = 3, last: int = 4) -> CarryState:
    return CarryState(9, DEPLOYMENT, 1, first, last, 2, Hop("d", ("h",), 1, 1))


def export() -> StateExport:
    return StateExport(order())


def rows_are_right(stage: LoadedStage, slot: int, tokens: int) -> None:
    for one in stage.chain:
        for block in one.shard.state_forms(3, 4).tokens:
            held = one.shard.held(slot, block)
            assert held.stop == tokens
            for rows in one.shard.export_part(slot, block, held.start, tokens).rows.values():
                assert (rows == np.arange(held.start, tokens)[:, None]).all()


def test_all_of_it_is_carried_while_sequences_go_on() -> None:
    """Each turn two tokens come; what is left at the end is little."""
    household, work = Household(), export()
    for sequence in (1, 2, 3):
        household.go(sequence, sequence, 100 * sequence)
    while household.carry(work):
        for sequence in (1, 2, 3):
            household.go(sequence, sequence, 2)
    for sequence, slot, tokens, _ in household.holder.chain[0].slots.holding(1):
        opened = household.enters(sequence, slot, tokens)
        assert opened.lacking in (-1, 4)
        held = tokens if opened.lacking < 0 else opened.held
        assert tokens - FEW_TOKENS - 2 <= held <= tokens
        rows_are_right(household.heir, slot, held)
    assert household.counts.dropped_frames == 0


def test_a_turn_copies_a_bounded_amount_and_no_token_twice() -> None:
    household, work = Household(width=256), export()
    household.go(1, 1, CONTEXT)
    copied = turns = 0
    while parts := work.turn(household.old):
        sizes = [sum(rows.nbytes for rows in carried.part.rows.values()) for carried in parts]
        assert sum(sizes) < TURN_BYTES + PART_BYTES and max(sizes) <= PART_BYTES
        copied, turns = copied + sum(sizes), turns + 1
    held = sum(len(household.holder.chain[0].shard.held(1, block)) for block in (2, 3))
    assert copied == held * 2 * 2 * 256 * 4 and turns == -(-copied // TURN_BYTES)


def test_it_ends_though_more_comes_all_the_time() -> None:
    household = Household()
    household.go(1, 1, 30)
    blocks = []
    for carried in parts_of(household.holder.chain, 1, 3, 4):
        blocks.append(carried.part.block)
        household.go(1, 1, FEW_TOKENS + 1)
    assert blocks == [2, 3] * MAX_ROUNDS


def test_few_tokens_are_computed_again_instead() -> None:
    household = Household()
    household.go(1, 1, FEW_TOKENS)
    assert export().turn(household.old) == []


def test_sequences_that_end_are_left_and_those_that_begin_are_taken() -> None:
    household, work = Household(width=512), export()
    household.go(1, 1, 400)
    assert household.carry(work)
    household.holder.release(1)
    household.go(2, 1, 60)
    parts = work.turn(household.old)
    assert {carried.sequence for carried in parts} == {2}
    for carried in parts:
        household.new.state_came(2, 1, carried)
    assert household.enters(2, 1, 60).lacking == -1
    rows_are_right(household.heir, 1, 60)


def test_only_the_layers_that_are_asked_for_are_carried() -> None:
    household = Household(layers=(3, 6))
    household.go(1, 1, 40)
    work = StateExport(order(4, 5))
    assert {carried.part.block for carried in work.turn(household.old)} == {3, 4}
    assert StateExport(order(1, 2)).turn(household.old) == []
    assert StateExport(order(7, 9)).turn(household.old) == []


@pytest.mark.parametrize("layers", [(3, 4), (3, 5), (2, 4), (4, 7)])
def test_on_the_same_device_a_sequence_takes_along_what_it_needs(layers: tuple[int, int]) -> None:
    """Of the layers 3 to 6. What is not there is computed again."""
    household = Household(layers=(3, 6))
    there = staged(2, layers, WIDTH)
    household.old.loaded(there)
    household.go(1, 1, 100)
    household.go(2, 2, 50)
    for sequence, slot, position in ((1, 1, 90), (2, 2, 50), (3, 3, 10)):
        opened = there.open(Opened(sequence, slot, Sampling(), position), (), household.old.shards)
        whole = layers[0] >= 3 and layers[1] <= 6 and sequence < 3
        assert (opened.lacking, opened.held) == ((-1, 0) if whole else (layers[1], 0))
    if layers == (3, 4):
        rows_are_right(there, 1, 90)


def test_nothing_is_taken_along_from_a_shard_of_another_form() -> None:
    """Rounded weights make other states."""
    household = Household(layers=(3, 6))
    spec = replace(staged(2, (3, 4), WIDTH).spec, quantize="int8")
    shard: Any = Kept(3, 4)
    there = LoadedStage(spec, [HeldShard.of(spec, shard)], lambda logits, draws: [])
    household.old.loaded(there)
    household.go(1, 1, 100)
    opened = there.open(Opened(1, 1, Sampling(), 90), (), household.old.shards)
    assert (opened.lacking, opened.held) == (4, 0)


def test_an_epoch_that_has_ended_is_not_carried_on() -> None:
    household, work = Household(width=512), export()
    household.go(1, 1, 400)
    assert work.turn(household.old)
    household.old.close("unloaded")
    with pytest.raises(RefusedError, match="epoch 1"):
        work.turn(household.old)


# ---- what a receiver lets in ----------------------------------------------------------------------------------------


def part(sequence: int, slot: int, block: int = 2, start: int = 0, count: int = 20, width: int = 2) -> CarriedPart:
    rows = np.arange(start, start + count, dtype=np.float32)[:, None] + np.zeros(width * WIDTH, np.float32)
    return CarriedPart(sequence, slot, StatePart(block, start, {"keys": rows, "values": rows}))


def whole(household: Household, sequence: int, slot: int) -> None:
    for block in (2, 3):
        household.new.state_came(2, 1, part(sequence, slot, block))


def test_what_never_becomes_complete_counts_for_nothing() -> None:
    household = Household()
    household.new.state_came(2, 1, part(1, 1))
    opened = household.enters(1, 1, 25)
    assert (opened.lacking, opened.held) == (4, 0)


def test_state_of_a_sequence_that_nobody_knows_is_forgotten_when_its_slot_is_needed() -> None:
    household = Household()
    whole(household, 666, 1)
    opened = household.enters(1, 1, 15)
    assert (opened.lacking, opened.held) == (4, 0)
    whole(household, 1, 1)
    assert household.counts.dropped_frames == 2, "the slot is in use"
    household.heir.chain[0].shard.forward(None, [TokenRun(1, 1, 0, 5)])
    household.heir.release(1)
    assert household.enters(666, 1, 20).lacking == 4


def test_of_two_sequences_for_one_slot_the_later_counts() -> None:
    household = Household()
    whole(household, 666, 1)
    household.new.state_came(2, 1, part(1, 1))
    household.new.state_came(2, 1, part(666, 1, 3))
    assert household.enters(1, 1, 20).lacking == 4
    whole(household, 666, 0)
    household.new.state_came(2, 1, part(4, 0))
    assert household.enters(4, 0, 20).lacking == 4, "the other block's rows are another's"
    whole(household, 5, 2)
    whole(household, 1, 3)
    assert household.enters(5, 2, 20).lacking == -1


def test_a_part_that_does_not_fit_spoils_only_its_own_sequence() -> None:
    household = Household()
    for sequence in (1, 2):
        whole(household, sequence, sequence)
    for wrong in (part(1, 1, start=30), part(1, 1, width=1), part(1, 1, block=9)):
        household.new.state_came(2, 1, wrong)
    assert household.enters(1, 1, 20).lacking == 4
    assert household.enters(2, 2, 20).lacking == -1


def test_after_the_switch_nothing_comes_in() -> None:
    """Neither into a slot in use nor into one that keeps what an ended sequence left."""
    household = Household()
    whole(household, 1, 1)
    assert household.enters(1, 1, 20).lacking == -1
    for _ in range(2):
        household.new.state_came(2, 1, part(1, 1, start=0, count=5))
        household.new.state_came(2, 1, part(7, 1, start=0, count=5))
        rows_are_right(household.heir, 1, 20)
        household.heir.release(1, keep=20)
    assert household.counts.dropped_frames == 4
    household.new.state_came(7, 1, part(1, 2))
    household.new.state_came(2, 0, part(1, 2))
    assert household.counts.dropped_frames == 6


def test_a_shard_takes_parts_for_free_slots_only() -> None:
    household = Household()
    whole(household, 1, 1)
    household.enters(1, 1, 20)
    with pytest.raises(EngineError, match="in use"):
        household.heir.chain[0].take_part(part(1, 1))


def test_sequences_that_an_open_ends_leave_nothing_at_the_head() -> None:
    """Else whoever sends OPENs fills the head's memory with answers."""
    spec = stage(1, stage=2, stages=3, first_layer=5, last_layer=6, slots=SLOTS, context=CONTEXT)
    shard: Any = Kept(5, 6, 2)
    head = LoadedStage(spec, [HeldShard.of(spec, shard)], lambda logits, draws: [])
    for sequence in range(1, 100):
        assert head.open(Opened(sequence, sequence % SLOTS, Sampling(), attempt=sequence), [1] * 20) is not None
    assert len(head._answers) == SLOTS
