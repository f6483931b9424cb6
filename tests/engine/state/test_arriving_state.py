"""A sequence's state taken to another shard in parts, while the sequence goes on where it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import base
from peerllm.engine.base import Shard, StatePart
from peerllm.engine.state.arriving_state import ArrivingSlot
from peerllm.engine.state.kv_slots import KVSlots
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, keys_and_values, reach_of
from peerllm.errors import BadInputError, EngineError
from tests.engine.runs import in_slot
from tests.engine.state.test_exported_state import CONTEXT, HEAD, SLACK, ids, load, logits, same

# Keys and values of all tokens and of a window; rounded to 16 bits; latent vectors.
FAST = [("ministral", "torch"), ("ministral", "graph"), ("ministral", "int8"), ("deepseek_v3", "graph")]
SLOW = [("llama", "torch"), ("mistral", "torch"), ("deepseek_v3", "torch"), ("llama", "graph"), ("mistral", "graph")]
KINDS = [*FAST, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)]


@pytest.fixture(autouse=True)
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "ROLLBACK_TOKENS", SLACK)


@dataclass
class Steps:
    """Sequences on a shard; token `position` of each is always the same."""

    shard: Shard
    lengths: dict[int, int] = field(default_factory=dict)

    def go(self, slot: int, count: int = 1) -> Any:
        start = self.lengths.get(slot, 0)
        self.lengths[slot] = start + count
        return logits([self.shard], slot, start, ids(CONTEXT, slot)[start : start + count])

    def together(self, *slots: int) -> None:
        """One step of several sequences, for which slots may change their places."""
        runs = [in_slot(slot, self.lengths[slot], 1, sample=True) for slot in slots]
        self.shard.forward(np.array([ids(CONTEXT, slot)[self.lengths[slot]] for slot in slots]), runs)
        self.lengths |= {slot: self.lengths[slot] + 1 for slot in slots}


def carry(here: Shard, slot: int, there: Shard, to: int, most: int, until: int, between: Callable[[], object]) -> None:
    """Every block's rows up to token `until`, at most `most` tokens at once."""
    for block in here.row_forms(0, HEAD):
        start = 0
        while start < until:
            start = max(start, here.held(slot, block).start)  # a window forgets while the sequence goes on
            stop = min(start + most, until)
            there.import_part(to, here.export_part(slot, block, start, stop))
            start = stop
            between()


@pytest.mark.parametrize("most", [3, 60])
@pytest.mark.parametrize(("model_type", "engine"), KINDS)
def test_a_sequence_goes_on_where_its_state_was_carried(model_type: str, engine: str, most: int) -> None:
    """It goes on here meanwhile, and others step there, so that windows slide and slots change their places."""
    here, there = Steps(load(model_type, engine)), Steps(load(model_type, engine))
    here.go(1, 17)
    there.go(0, 4)
    there.go(2, 4)

    def between() -> None:
        if here.lengths[1] < 17 + SLACK:
            here.go(1)
        if there.lengths[2] < 30:
            there.together(0, 2)

    carry(here.shard, 1, there.shard, 1, most, 17, between)
    assert there.shard.settle(1)[0] == 17
    there.lengths[1] = 17
    while there.lengths[1] < here.lengths[1]:
        there.go(1)
    for _ in range(6):
        same(here.go(1), there.go(1), here.shard)
    undisturbed = Steps(load(model_type, engine))
    for slot in (0, 2):
        undisturbed.go(slot, there.lengths[slot])
        np.testing.assert_allclose(undisturbed.go(slot), there.go(slot), rtol=1e-3, atol=1e-4)
    with pytest.raises(EngineError, match="holds a sequence"):
        there.shard.import_part(1, here.shard.export_part(1, 0, here.lengths[1] - 1, here.lengths[1]))


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_what_came_since_may_follow_and_the_least_counts(model_type: str, engine: str) -> None:
    here, there = Steps(load(model_type, engine)), Steps(load(model_type, engine))
    here.go(1, 17)
    carry(here.shard, 1, there.shard, 2, 60, 17, lambda: None)
    here.go(1, 8)
    blocks = list(here.shard.row_forms(0, HEAD))
    for block in blocks[:-1]:
        there.shard.import_part(2, here.shard.export_part(1, block, 17, 25))
    there.shard.import_part(2, here.shard.export_part(1, blocks[-1], 17, 22))
    there.shard.import_part(2, here.shard.export_part(1, blocks[-1], 20, 24))  # some of it again
    assert there.shard.settle(2)[0] == 24
    tokens = ids(CONTEXT, 1)
    for position in range(24, 30):
        same(*(logits([one], slot, position, tokens[position : position + 1]) for one, slot in
               ((here.shard, 1), (there.shard, 2))), here.shard)  # fmt: skip


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_nothing_is_held_until_every_block_has_its_rows(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    logits([here], 1, 0, ids(17, 1))
    *most, last = here.row_forms(0, HEAD)
    for block in most:
        there.import_part(1, here.export_part(1, block, here.held(1, block).start, 17))
    assert there.settle(1) == (0, 0)
    there.import_part(1, here.export_part(1, last, here.held(1, last).start, 17))
    assert there.settle(1) == (0, 0), "what was settled is forgotten"
    logits([there], 1, 0, ids(17, 1))
    same(*(logits([shard], 1, 17, ids(1, 2)) for shard in (here, there)), here)


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_a_sequence_that_begins_afresh_takes_nothing_over(model_type: str, engine: str) -> None:
    here, there = load(model_type, engine), load(model_type, engine)
    logits([here], 1, 0, ids(9, 1))
    for begins in (lambda: logits([there], 1, 0, ids(3, 5)), lambda: None):
        carry(here, 1, there, 1, 60, 9, lambda: None)
        begins()
        there.release(1)
        with pytest.raises(EngineError, match="nothing has arrived"):
            there.settle(1)


@pytest.mark.parametrize(("model_type", "engine"), [("ministral", "torch"), ("ministral", "graph")])
def test_rows_that_are_not_held_are_not_exported(model_type: str, engine: str) -> None:
    shard = load(model_type, engine)
    logits([shard], 1, 0, ids(40, 1))
    starts = {block: shard.held(1, block).start for block in shard.row_forms(0, HEAD)}
    assert 0 in starts.values() and max(starts.values()) > 0
    for block, start in starts.items():
        for wrong in ((start - 1, 40), (39, 41), (40, 41), (39, 39), (39, 38), (-1, 40)):
            with pytest.raises(EngineError):
                shard.export_part(1, block, *wrong)


@pytest.mark.parametrize("engine", ["torch", "graph"])
def test_recurrent_shards_are_not_carried_in_parts(engine: str) -> None:
    assert load("lfm2", engine).row_forms(0, HEAD) == {}


def test_only_the_blocks_of_some_layers_are_named() -> None:
    shard = load("ministral", "graph")
    assert list(shard.row_forms(0, HEAD)) == [0, 1, 2, 3]
    assert list(shard.row_forms(0, 1)) == [0] and list(shard.row_forms(2, 3)) == [1, 2]
    assert list(shard.row_forms(HEAD, HEAD)) == [] == list(shard.row_forms(0, 0))


# ---- without a model ------------------------------------------------------------------------------------------------

STATES = {3: keys_and_values(2, 4, "float32"), 4: keys_and_values(2, 4, "float32", 5)}


def part(block: int, start: int, count: int, names: tuple[str, ...] = ("keys", "values"), **form: Any) -> StatePart:
    numbers = np.arange(start, start + count)[:, None] + np.zeros(form.get("width", 8))
    return StatePart(block, start, {name: numbers.astype(form.get("dtype", "float32")) for name in names})


WRONG = [
    part(5, 0, 2), part(3, 0, 2, ("keys",)), part(3, 0, 2, ("keys", "values", "latent")), part(3, 0, 2, width=7),
    part(3, 0, 2, width=16), part(3, 0, 2, dtype="float16"), part(3, 0, 0), part(3, 5, 2), part(3, 0, CONTEXT + 1),
    part(3, -1, 2), part(4, CONTEXT, 1), part(4, CONTEXT - 1, 2), part(4, 0, 5 + 2 * SLACK + 1),
    StatePart(3, 0, {"keys": np.zeros((2, 8), "float32"), "values": np.zeros((3, 8), "float32")}),
    StatePart(3, 0, {"keys": np.zeros((2, 2, 4), "float32"), "values": np.zeros((2, 8), "float32")}),
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_part_that_does_not_fit_changes_nothing(wrong: StatePart) -> None:
    slots = KVSlots(STATES, 2, CONTEXT)
    for block in STATES:
        slots.add(1, part(block, 0, 4))
    before = {name: store.copy() for name, store in slots.stores.items()}
    with pytest.raises(BadInputError):
        slots.add(1, wrong)
    assert all((store == before[name]).all() for name, store in slots.stores.items())
    assert slots.settle(1) == (4, 4)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(sorted(STATES)), st.integers(0, CONTEXT), st.integers(1, 8)), max_size=25))
def test_every_row_is_its_tokens_whatever_arrives_in_whatever_order(parts: list[tuple[int, int, int]]) -> None:
    """The number in each row is its token's position. What counts as held lies there, and is enough for the windows."""
    slots, arriving = KVSlots(STATES, 1, CONTEXT), ArrivingSlot(STATES, CONTEXT)
    stops = {block: 0 for block in STATES}
    for block, start, count in parts:
        try:
            arriving.place(part(block, start, count))
        except BadInputError:
            with pytest.raises(BadInputError):
                slots.add(0, part(block, start, count))
            assert start + count > CONTEXT or (block == 3 and start > stops[3])
        else:
            slots.add(0, part(block, start, count))
            stops[block] = start + count
    tokens, furthest = slots.settle(0) if any(stops.values()) else (0, 0)
    assert tokens in (0, min(stops.values()))
    for position in range(1, tokens):
        if reach_of(STATES.values()).allows(position, furthest):
            slots.check([in_slot(0, position, 1)])
    for block in STATES if tokens else ():
        held = slots.held(0, block)
        assert held.stop == tokens and len(held) >= STATES[block].seen(tokens)
        for rows in slots.part(0, block, held.start, tokens).rows.values():
            assert (rows == np.arange(held.start, tokens)[:, None]).all()


def test_rows_change_their_place_with_their_slot() -> None:
    """Slots 0 and 2 step together, for which the slot between them, still empty, makes room."""
    slots = KVSlots(STATES, 3, CONTEXT)
    slots.add(1, part(3, 0, 6))
    slots.seek(runs := [in_slot(0, 0, 1), in_slot(2, 0, 1)])
    slots.advance(runs)
    for block, start in ((3, 6), (4, 0)):
        slots.add(1, part(block, start, 8 - start))
    assert slots.settle(1) == (8, 8)
    for rows in slots.part(1, 3, 0, 8).rows.values():
        assert (rows == np.arange(8)[:, None]).all()


def test_a_whole_state_of_fixed_arrays_does_not_arrive_in_parts() -> None:
    states = {0: LayerState((), (SequenceArray("recurrent", (4,)),))}
    with pytest.raises(BadInputError, match="keeps nothing of a token"):
        KVSlots(states, 1, CONTEXT).add(0, part(0, 0, 1))
