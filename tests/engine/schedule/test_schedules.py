"""Which steps enter together: no batch too large, none left behind, even again soon, whatever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from peerllm.engine.schedule.step_schedules import SCHEDULES, Bubble, NoBubble, Sequential
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import batches_of

LAPS_UNTIL_EVEN = 2


def step(sequence: int) -> TokenRun:
    return TokenRun(sequence, sequence, 9, 1, True)


class Circling(RuleBasedStateMachine):
    """Batches come back in any order, sequences start and end at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.turns, self.size, self.count = NoBubble(3, 2), 3, 2
        self.flying: list[list[int]] = []
        self.waiting: dict[int, list[list[int]]] = {}  # due, and the batches it may have to wait for
        self.number = 0

    @rule(size=st.integers(1, 5), count=st.integers(1, 5))
    @precondition(lambda self: not self.number)
    def plan(self, size: int, count: int) -> None:
        self.turns, self.size, self.count = NoBubble(size, count), size, count

    @property
    def running(self) -> list[int]:
        return [*self.waiting, *(one for batch in self.flying for one in batch)]

    def enter(self) -> None:
        for batch in self.turns.steps(False, False):
            members = [one.sequence for one in batch]
            assert members and len(members) <= self.size
            for one in members:
                del self.waiting[one]  # nobody enters who is not due, or twice
            self.flying.append(members)

    def due(self, sequence: int) -> None:
        self.waiting[sequence] = list(self.flying)
        self.turns.due(step(sequence))

    @rule()
    @precondition(lambda self: len(self.running) < 12)
    def start(self) -> None:
        self.number += 1
        self.due(self.number)
        self.enter()

    @rule(data=st.data())
    @precondition(lambda self: self.flying)
    def back(self, data: st.DataObject) -> None:
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        for one in batch:
            self.turns.left(one)
        for one in batch:
            self.due(one)
        self.enter()

    @rule(data=st.data())
    @precondition(lambda self: self.running)
    def end(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.running))
        self.turns.left(gone)
        self.waiting.pop(gone, None)
        for batch in self.flying:
            if gone in batch:
                batch.remove(gone)
        self.flying = [batch for batch in self.flying if batch]
        self.waiting = {one: list(self.flying) for one in self.waiting}  # fewer batches may be right from now on
        self.enter()

    @rule()
    def even_again(self) -> None:
        """Left alone, the batches are as many as planned and as even as may be."""
        if not self.running:
            return
        for _ in range(LAPS_UNTIL_EVEN):
            for batch in list(self.flying):
                self.flying.remove(batch)
                for one in batch:
                    self.turns.left(one)
                for one in batch:
                    self.due(one)
                self.enter()
        sizes = [len(batch) for batch in self.flying]
        assert not self.waiting
        assert len(sizes) == batches_of(sum(sizes), self.size, self.count)
        assert max(sizes) - min(sizes) <= 1

    @invariant()
    def nobody_waits_while_there_is_room(self) -> None:
        if self.waiting:
            assert len(self.flying) >= batches_of(len(self.running), self.size, self.count)

    @invariant()
    def nobody_waits_longer_than_a_lap(self) -> None:
        for sequence, before in self.waiting.items():
            assert any(any(batch is one for one in self.flying) for batch in before), sequence


TestCircling = Circling.TestCase
TestCircling.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_a_division_is_as_planned_where_it_can_be(sequences: int, size: int, count: int) -> None:
    batches = batches_of(sequences, size, count)
    assert 1 <= batches <= sequences and -(-sequences // batches) <= size
    assert batches == min(count, sequences) or (batches > count and (batches - 1) * size < sequences)


def test_with_bubbles_a_round_waits_for_its_last() -> None:
    turns = Bubble(2, 2)
    for sequence in range(4):
        turns.due(step(sequence))
    assert [[one.sequence for one in batch] for batch in turns.steps(False, False)] == [[0, 1], [2, 3]]
    for sequence in (0, 1, 2):
        turns.left(sequence)
        turns.due(step(sequence))
        assert turns.steps(False, False) == []
    turns.left(3)  # it has ended
    assert [[one.sequence for one in batch] for batch in turns.steps(False, False)] == [[0, 1], [2]]


def test_in_turn_one_pass_at_a_time_and_prompts_have_theirs() -> None:
    turns = Sequential(4, 4)
    turns.due(step(1))
    turns.due(step(2))
    assert turns.steps(True, True) == [] and turns.chunks(True) == 0  # a prompt's chunk is under way
    (batch,) = turns.steps(True, False)
    assert [one.sequence for one in batch] == [1] and turns.chunks(False) == 0
    turns.left(1)
    turns.due(step(1))
    assert turns.steps(True, False) == [] and turns.chunks(False) == 1
    (batch,) = turns.steps(True, False)
    assert [one.sequence for one in batch] == [2]
    turns.left(2)
    (batch,) = turns.steps(False, False)
    assert [one.sequence for one in batch] == [1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_who_has_left_is_forgotten(name) -> None:  # type: ignore[no-untyped-def]
    turns = SCHEDULES[name](2, 2)
    turns.due(step(1))
    turns.left(1)
    turns.left(1)
    assert turns.steps(False, False) == [] and turns.under_way == 0
    turns.due(step(2))
    assert len(turns.steps(False, False)) == 1
    turns.left(2)
    turns.due(step(3))
    assert len(turns.steps(False, False)) == 1
