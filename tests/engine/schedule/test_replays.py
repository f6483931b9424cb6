"""What a source feeds again: after the last OPEN alone, in the same runs, within the new plan."""

from __future__ import annotations

import pytest

from peerllm.engine.base import Reach
from peerllm.engine.messages import Submit
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.errors import OverloadedError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, VOCABULARY, stage

CUTS = ((1, 8), (9, 2), (20, 4))


def submit(sequence: int, prompt: int, max_tokens: int = 5) -> Submit:
    return Submit(DEPLOYMENT, sequence, tuple(range(prompt)), max_tokens, (), Sampling())


def run(sequence: int, length: int, position: int) -> TokenRun:
    return TokenRun(sequence, sequence, position, length)


def test_only_the_answer_to_the_last_open_counts_and_once() -> None:
    sequences = SourceSequences(
        DEPLOYMENT, slots=1, context=1000, chunk=4, stages=2, vocabulary=VOCABULARY, reach=Reach(True)
    )
    sequences.submit(submit(1, 100))
    sequences.leave(1)
    first, _ = sequences.enter(1)
    assert [feed.position for feed in sequences.feed()] == [0, 4, 8, 12]
    sequences.leave(1)
    second, _ = sequences.enter(1)
    assert [feed.position for feed in sequences.feed()] == [0, 4, 8, 12]
    assert sequences.came_round(first) is None and sequences.is_late(run(1, 4, 0)), "the second is awaited still"
    assert sequences.came_round(second) is None and not sequences.is_late(run(1, 4, 0))
    assert sequences.came_back(run(1, 4, 0), None) == (None, None)
    assert sequences.came_round(second.lacks(1, 0)) is None, "it came twice"
    sequences.leave(1)
    third, _ = sequences.enter(1)
    sequences.feed()
    again = sequences.came_round(third.lacks(1, 0))
    assert again is not None and again[0].position == 0 and again[0].through == 1
    assert sequences.came_round(again[0]) is None
    flying, fed = sequences.feed(), list[tuple[int, int, int]]()
    while flying:
        due = flying.pop(0)
        fed.append((due.position, due.length, due.through))
        sequences.came_back(due, 7 if due.sample else None)
        flying += sequences.feed()
    assert fed == [(0, 4, 1), *((at, 4, -1) for at in range(4, 100, 4))] and not sequences.prompting


def again_from_the_start(sequences: SourceSequences) -> list[int]:
    """The lengths of the runs in which the only sequence is computed again."""
    (sequence,) = sequences.running
    sequences.leave(sequence)
    opened, _ = sequences.enter(sequence)
    again = sequences.came_round(opened.lacks(1, 0))
    assert again is not None and sequences.came_round(again[0]) is None
    lengths, flying = list[int](), sequences.feed()
    while flying:
        due = flying.pop(0)
        lengths.append(due.length)
        if due.through >= 0:
            sequences.came_back(due, None)
        flying += sequences.feed()
    return lengths


def test_what_cannot_be_taken_up_again_is_computed_in_the_same_runs_if_chunks_are_no_smaller_now() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=99, chunk=8, stages=9, vocabulary=VOCABULARY, cuts=CUTS)
    sequences.submit(submit(1, 8, 9))
    (due,) = sequences.feed()
    for _ in range(4):
        step, _ = sequences.came_back(due, 7)
        assert step is not None
        due = step
    assert again_from_the_start(sequences) == [8, 1, 1, 1], "of 11 tokens the plan would make chunks of 2"
    sequences.change_to(stage(1, epoch=1, stages=9, slots=1, context=99, chunk=4))
    assert again_from_the_start(sequences) == [4, 4, 1, 1, 1]


def test_a_plan_with_fewer_slots_gives_no_others() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=3, context=99, chunk=8, stages=1, vocabulary=VOCABULARY)
    sequences.change_to(stage(1, epoch=1, slots=1, context=99))
    assert sequences.submit(submit(1, 3)) == 0
    with pytest.raises(OverloadedError):
        sequences.submit(submit(2, 3))
