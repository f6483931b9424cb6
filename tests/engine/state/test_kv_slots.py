"""Keys and values stay with their sequences, whatever batches form, slide, go back, fail and are released."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import base as module
from peerllm.engine.base import Reach, StatePart
from peerllm.engine.state.arriving_state import ArrivingSlot
from peerllm.engine.state.kv_slots import Batch, KVSlots
from peerllm.engine.state.state_kinds import LayerState, SequenceArray, keys_and_values, slot_bytes
from peerllm.errors import EngineError
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.runs import in_slot
from tests.sizes import FULL

EXAMPLES = 1500 if FULL else 60
SLOTS, CONTEXT, ROLLBACK = 4, 48, 3
WINDOWS = (None, 5, 9, 60)  # a window wider than the context never slides
REACH = Reach(True, 5 + 2 * ROLLBACK, ROLLBACK)


class Sequences:
    """The slots, and beside them what each should hold: its tokens, numbered as they were written."""

    def __init__(self) -> None:
        states = {number: keys_and_values(2, 8, "float32", window) for number, window in enumerate(WINDOWS)}
        self.slots = KVSlots(states, SLOTS, CONTEXT)
        self.tokens: list[list[int]] = [[] for _ in range(SLOTS)]
        self.furthest = [0] * SLOTS
        self.fresh = itertools.count(1)

    def go(self, runs: list[TokenRun], fails: bool) -> None:
        """One pass: the graphs write every each's tokens, and read what its queries see."""
        allowed = all(REACH.allows(part.position, self.furthest[part.slot]) or not part.position for part in runs)
        before = [list(tokens) for tokens in self.tokens]
        try:
            self.slots.check(runs)
        except EngineError:
            assert not allowed
            self.check(before)
            return
        batch = self.slots.seek(runs)
        self.written(runs, batch)
        for part in runs:  # a pass that fails has made room all the same
            reached = part.position + part.length
            self.furthest[part.slot] = max(self.furthest[part.slot], reached) if part.position else reached
            if fails:
                del self.tokens[part.slot][part.position :]
        if not fails:
            self.slots.advance(runs)
        self.check(self.tokens)

    def written(self, runs: list[TokenRun], batch: Batch) -> None:
        assert sorted(batch.order) == list(range(len(runs)))
        assert 0 <= batch.first <= SLOTS - len(runs)
        for row in batch.order:
            part = runs[row]
            del self.tokens[part.slot][part.position :]
            self.tokens[part.slot] += itertools.islice(self.fresh, part.length)
        for group, last, total in zip(self.slots.groups.values(), batch.last, batch.total, strict=True):
            assert total[0] == max(last) + 1 <= group.room
            for place, row in enumerate(batch.order):
                part, end = runs[row], int(last[place]) + 1
                tokens = self.tokens[part.slot]
                for number, store in enumerate(group.stores):
                    store[batch.first + place, :, end - part.length : end] = values(tokens[part.position :], number)
                    seen = min(len(tokens), end, part.length + (group.state.window or CONTEXT) - 1)
                    assert seen == min(len(tokens), part.length + (group.state.window or CONTEXT) - 1)
                    held = store[batch.first + place, :, end - seen : end]
                    np.testing.assert_array_equal(held, values(tokens[len(tokens) - seen :], number))

    def check(self, tokens: list[list[int]]) -> None:
        """What every slot holds is the end of its sequence, wherever the slot lies."""
        for slot, own in enumerate(tokens):
            place = self.slots._place[slot]
            for group in self.slots.groups.values():
                held = group.held[slot]
                assert group.state.seen(len(own)) <= held <= len(own)
                for number, store in enumerate(group.stores):
                    wanted = values(own[len(own) - held :], number)
                    np.testing.assert_array_equal(store[place, :, :held], wanted)


class Recurrences:
    """Slots of layers that keep fixed arrays, beside what each sequence is: the tokens that it has taken in."""

    def __init__(self) -> None:
        fixed = SequenceArray("recurrent", (2, 3)), SequenceArray("convolution", (4,))
        self.states = {3: LayerState(fixed=fixed), 5: keys_and_values(1, 8, "float32")}
        self.slots = KVSlots(self.states, SLOTS, CONTEXT)
        assert self.slots.nbytes == slot_bytes(self.states.values(), SLOTS, CONTEXT)
        self.tokens: list[tuple[int, ...]] = [()] * SLOTS
        self.known: list[dict[int, tuple[int, ...]]] = [{} for _ in range(SLOTS)]  # by position
        self.fresh = itertools.count(1)

    def go(self, runs: list[TokenRun], fails: bool) -> None:
        allowed = all(not run.position or run.position in self.known[run.slot] for run in runs)
        try:
            self.slots.check(runs)
        except EngineError:
            assert not allowed
            return
        assert allowed
        batch = self.slots.seek(runs)
        for place, row in enumerate(batch.order):
            run = runs[row]
            known = self.known[run.slot]
            before = known[run.position] if run.position else ()
            self.holds(batch.first + place, before)
            self.tokens[run.slot] = (*before, *itertools.islice(self.fresh, run.length))
            for number, store in enumerate(self.slots._fixed):
                store[batch.first + place] = told(self.tokens[run.slot], number)
            snapshots = {at: one for at, one in known.items() if at == self.snapshot(run.slot) and at <= run.position}
            self.known[run.slot] = snapshots | ({} if fails else {len(self.tokens[run.slot]): self.tokens[run.slot]})
        if not fails:
            self.slots.advance(runs)

    def snapshot(self, slot: int) -> int:
        return self.slots._snapshot_at[slot]

    def keep(self, slot: int) -> None:
        length = len(self.tokens[slot])
        if self.known[slot].get(length) == self.tokens[slot] and length:
            self.slots.keep_snapshot(slot)
            self.known[slot] = {length: self.tokens[slot]}

    def move(self, slot: int, to: int, position: int) -> None:
        """Its state as it is or was at a position goes to another slot; what is there is forgotten."""
        self.slots.release(to)
        self.slots.add(to, self.slots.fixed_part(slot, 3, position))
        self.slots.add(to, self.slots.part(slot, 5, 0, position))
        assert self.slots.settle(to) == (position, position)
        self.tokens[to] = self.known[slot][position]
        self.known[to] = {position: self.tokens[to]}

    def holds(self, place: int, tokens: tuple[int, ...]) -> None:
        for number, store in enumerate(self.slots._fixed):
            np.testing.assert_array_equal(store[place], told(tokens, number) if tokens else 0)


def told(tokens: tuple[int, ...], number: int) -> float:
    """What a fixed array is full of after these tokens."""
    return float(hash(tokens) % 2**20 + number)


@settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_sequences_keep_their_recurrent_states(data: st.DataObject) -> None:
    made = Recurrences()

    def position(slot: int, count: int) -> int:
        places = [0, len(made.tokens[slot]), len(made.tokens[slot]), *made.known[slot], data.draw(st.integers(0, 9))]
        return min(data.draw(st.sampled_from(places)), CONTEXT - count)

    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(("steps", "steps", "chunk", "snapshot", "snapshot", "release", "moved")))
        fails = data.draw(st.integers(0, 9)) == 0
        some = data.draw(st.permutations(range(SLOTS)))
        one, other = some[:2]
        if what == "steps":
            members = some[: data.draw(st.integers(1, SLOTS))]
            made.go([in_slot(slot, position(slot, 1), 1) for slot in members], fails)
        elif what == "chunk":
            made.go([in_slot(one, position(one, 7), 7)], fails)
        elif what == "snapshot":
            made.keep(one)
        elif what == "release":
            made.slots.release(one)
            made.tokens[one], made.known[one] = (), {}
        elif made.known[one]:
            made.move(one, other, data.draw(st.sampled_from(sorted(made.known[one]))))
        else:
            with pytest.raises(EngineError, match="no state after"):
                made.slots.fixed_part(one, 3, len(made.tokens[one]))


def test_a_snapshot_stays_with_its_sequence_wherever_the_slot_lies() -> None:
    made = Recurrences()
    for slot in range(SLOTS):
        made.go([in_slot(slot, 0, 5 + slot)], fails=False)
    made.go([in_slot(0, 5, 1), in_slot(3, 8, 1)], fails=False)
    assert made.slots._place != list(range(SLOTS))
    for slot in range(SLOTS):
        made.keep(slot)
    kept = [made.snapshot(slot) for slot in range(SLOTS)]
    assert kept == [6, 6, 7, 9]
    made.go([in_slot(slot, kept[slot], 1) for slot in (1, 2)], fails=False)
    made.go([in_slot(slot, kept[slot], 1) for slot in (0, 3)], fails=False)
    made.go([in_slot(slot, kept[slot] + 1, 1) for slot in (2, 0)], fails=False)
    for slot in range(SLOTS):  # `go` compares what is there with what the snapshot was made of
        made.go([in_slot(slot, kept[slot], 2)], fails=slot == 1)
    # A sequence that begins afresh has no snapshot, even where it grows beyond the old one.
    made.go([in_slot(0, 0, 20)], fails=False)
    with pytest.raises(EngineError, match="cannot go back"):
        made.slots.check([in_slot(0, 6, 1)])


def values(tokens: list[int], number: int) -> np.ndarray:
    """What a store holds of them [groups, tokens, width]: different in every number of a head."""
    rows = np.array(tokens, np.float32)[None, :, None] * 64
    return rows + np.arange(2)[:, None, None] * 16 + np.arange(8)[None, None] + number * 32


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROLLBACK_TOKENS", ROLLBACK)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_sequences_keep_their_keys_and_values(data: st.DataObject) -> None:
    made = Sequences()

    def position(slot: int, count: int) -> int:
        length = len(made.tokens[slot])
        back = data.draw(st.one_of(st.just(0), st.integers(0, ROLLBACK), st.integers(0, length)))
        return min(max(length - back, 0), CONTEXT - count)

    for _ in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(("steps", "steps", "chunk", "chunk", "release")))
        fails = data.draw(st.integers(0, 9)) == 0
        some = data.draw(st.permutations(range(SLOTS)))
        if what == "steps":
            members = some[: data.draw(st.integers(1, SLOTS))]
            made.go([in_slot(slot, position(slot, 1), 1) for slot in members], fails)
        elif what == "chunk":
            count = data.draw(st.integers(1, made.slots.longest))
            made.go([in_slot(some[0], position(some[0], count), count)], fails)
        else:
            made.slots.release(some[0])
            made.tokens[some[0]], made.furthest[some[0]] = [], 0
            made.check(made.tokens)


def test_a_position_beyond_what_is_held_or_the_context_is_refused() -> None:
    made = Sequences()
    made.go([in_slot(0, 0, 4)], fails=False)
    wrong = (in_slot(1, 1, 1), in_slot(1, 0, CONTEXT + 1), in_slot(1, -1, 1), in_slot(SLOTS, 0, 1), in_slot(-1, 0, 1))
    for each in (*wrong, in_slot(0, 4, 1)):  # the last: twice
        with pytest.raises(EngineError):
            made.slots.check([in_slot(0, 4, 1), each])
    made.check(made.tokens)


def test_members_of_a_batch_that_lie_side_by_side_stay_where_they_are() -> None:
    made = Sequences()
    for slot in range(SLOTS):
        made.go([in_slot(slot, 0, 5)], fails=False)
    places = list(made.slots._place)
    assert made.slots.seek([in_slot(2, 5, 1), in_slot(1, 5, 1)]).order == (1, 0)
    assert made.slots._place == places


def test_what_came_before_is_a_snapshot_if_it_is_of_an_earlier_place_in_every_block() -> None:
    states = dict.fromkeys(range(2), LayerState(fixed=(SequenceArray("recurrent", (1,)),)))

    def snapshot(*parts: tuple[int, int]) -> int:
        slot = ArrivingSlot(states, 99)
        for block, position in parts:
            rows = np.zeros((1, 1), np.float32)
            slot.place(StatePart(block, position - 1, {"recurrent": rows}))
        return slot.snapshot

    assert snapshot((0, 5), (1, 5), (0, 9), (1, 9)) == 5
    assert snapshot((0, 5), (1, 5)) == 0
    assert snapshot((0, 5), (1, 4), (0, 9), (1, 9)) == 0
    assert snapshot((0, 9), (1, 9), (0, 5), (1, 5)) == 0


def test_a_snapshot_is_no_more_when_the_slot_begins_afresh() -> None:
    slots = KVSlots({0: LayerState(fixed=(SequenceArray("recurrent", (1,)),))}, 1, 20)
    for snapshot in (True, False):
        run = in_slot(0, 0, 8)
        slots.check([run])
        slots.seek([run])
        slots.advance([run])
        if snapshot:
            slots.keep_snapshot(0)
        assert slots.steady(0) == (8 if snapshot else 0)
    with pytest.raises(EngineError, match="no state"):
        slots.fixed_part(0, 0, 5)
