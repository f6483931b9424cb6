"""Who holds which slot of a shard: what is late, what is foreign, where a sequence can go on."""

from __future__ import annotations

import pytest

from peerllm.engine.base import Reach
from peerllm.engine.state.slot_table import SlotTable
from peerllm.errors import FrameError
from peerllm.transport.frames.token_run import TokenRun

WINDOW = Reach(True, room=8, slack=2)
RECURRENT = Reach(False)


def held(table: SlotTable, sequence: int, slot: int, tokens: int, snapshot: int = 0) -> None:
    """The next `tokens` tokens of a sequence are taken in and computed, with a snapshot after so many of them."""
    start = table._held[sequence].tokens
    for at, length in ((0, snapshot), (snapshot, tokens - snapshot)):
        if length:
            run = TokenRun(sequence, slot, start + at, length, snapshot=bool(snapshot and not at))
            assert table.extend(run)
            table.computed(run)


def test_an_open_is_late_after_a_later_one_for_its_sequence_or_its_slot() -> None:
    table = SlotTable(3, 10)
    table.enter(1, 0, attempt=5)
    assert table.is_late(1, 0, 4) and table.is_late(1, 0, 5), "it came twice"
    assert not table.is_late(1, 0, 6)
    assert table.is_late(1, 1, 4), "for another slot, too"
    assert table.is_late(2, 0, 4), "an earlier one for the slot"
    assert not table.is_late(2, 0, 6) and not table.is_late(2, 1, 4)
    table.enter(2, 0, attempt=6)
    assert table.is_late(1, 0, 5) and not table.is_late(1, 1, 5), "of the first nothing is known any more"


def test_an_open_is_late_for_a_slot_whose_sequence_has_ended_and_left_something() -> None:
    table = SlotTable(3, 10, Reach(True))
    table.enter(1, 0, attempt=5)
    held(table, 1, 0, 4)
    assert table.release(1, keep=4) == 0 and table.kept(0) == 4
    assert table.is_late(2, 0, 4) and not table.is_late(2, 0, 6)


def test_runs_of_another_epoch_are_dropped() -> None:
    table = SlotTable(2, 10)
    table.enter(1, 0, epoch=3)
    assert not table.extend(TokenRun(1, 0, 0, 4), epoch=2) and not table.extend(TokenRun(1, 0, 0, 4), epoch=4)
    assert table.extend(TokenRun(1, 0, 0, 4), epoch=3)
    assert table.release(1, epoch=2) is None and table.holds(1, 0, 3)


def test_runs_that_come_too_early_after_it_went_back_are_dropped_and_else_refused() -> None:
    table = SlotTable(2, 10)
    assert table.enter(1, 0, position=6) == 0
    assert not table.extend(TokenRun(1, 0, 6, 1)), "the source does not know yet that it must go back"
    assert table.enter(1, 0) == 0
    with pytest.raises(FrameError, match="does not follow"):
        table.extend(TokenRun(1, 0, 6, 1))
    assert table.extend(TokenRun(1, 0, 0, 10))
    with pytest.raises(FrameError, match="do not fit"):
        table.extend(TokenRun(1, 0, 10, 1))


def test_a_sequence_that_takes_a_slot_ends_the_one_that_had_it() -> None:
    table = SlotTable(2, 10)
    table.enter(1, 0)
    table.enter(2, 1)
    assert table.standing(3, 0) == {1} and table.standing(1, 1) == {1, 2} and table.standing(1, 0) == {1}
    table.enter(1, 1)
    assert 2 not in table and table.holds(1, 1) and not table.taken(0)
    table.enter(3, 1)
    assert 1 not in table and table.in_use(0) == 1


def test_what_was_left_under_a_number_in_use_ends_alone() -> None:
    table = SlotTable(2, 10, Reach(True))
    table.enter(1, 0)
    held(table, 1, 0, 4)
    table.release(1, keep=4)
    table.enter(1, 1)
    table.enter(2, 0)
    assert table.holds(1, 1) and table.holds(2, 0)


def test_what_an_ended_sequence_left_is_for_the_one_that_comes_after_it() -> None:
    table = SlotTable(2, 20, Reach(True))
    table.enter(1, 0)
    held(table, 1, 0, 9)
    assert table.release(1, keep=7) == 0 and table.kept(0) == 7 and table.taken(0) and not table.in_use(0)
    assert table.standing(2, 0) == set()
    assert table.enter(2, 0, position=5, after=1) == 5
    assert table.kept(0) == 0, "it is idle no more"
    held_before = table.holding(0)
    assert held_before == [(2, 0, 9, 9)]
    table.release(2)
    assert table.enter(3, 0, position=5, after=2) == 0, "nothing was kept"
    table.release(3)
    table.enter(4, 0)
    held(table, 4, 0, 5)
    table.release(4, keep=5)
    assert table.enter(6, 0, position=5, after=5) == 0, "it is another's"


def test_more_than_was_computed_is_not_kept() -> None:
    table = SlotTable(2, 20, Reach(True))
    table.enter(1, 0)
    held(table, 1, 0, 4)
    assert table.extend(TokenRun(1, 0, 4, 3))
    assert table.release(1, keep=7) == 0 and not table.kept(0) and not table.taken(0)


@pytest.mark.parametrize(("reach", "goes_on"), [(None, {0, 9}), (Reach(True), set(range(10)))])
def test_where_a_sequence_can_go_on(reach: Reach | None, goes_on: set[int]) -> None:
    for position in range(12):
        table = SlotTable(1, 20, reach)
        table.enter(1, 0)
        held(table, 1, 0, 9)
        assert (table.enter(1, 0, position) == position) == (position in goes_on)


def test_a_window_goes_back_as_far_as_its_slack_and_not_again_from_there() -> None:
    table = SlotTable(1, 20, WINDOW)
    table.enter(1, 0)
    held(table, 1, 0, 8)
    assert table.enter(1, 0, 3) == 3, "the room is not full"
    held(table, 1, 0, 7)
    assert table.enter(1, 0, 8) == 8 and table.enter(1, 0, 7) == 0
    held(table, 1, 0, 9)
    assert table.enter(1, 0, 7) == 7, "it has begun afresh"
    table.enter(1, 0, 0)
    held(table, 1, 0, 10)
    assert table.enter(1, 0, 8) == 8
    held(table, 1, 0, 1)
    assert table.enter(1, 0, 7) == 0, "it had held 10 before"


def test_a_window_that_lacks_much_goes_on_from_what_it_has() -> None:
    table = SlotTable(1, 20, WINDOW)
    table.enter(1, 0)
    held(table, 1, 0, 9)
    assert table.enter(1, 0, 15) == 9 and table.enter(1, 0, 9) == 9


def test_recurrent_layers_go_back_to_their_snapshot_until_they_pass_below_it() -> None:
    table = SlotTable(1, 20, RECURRENT)
    table.enter(1, 0)
    held(table, 1, 0, 9, snapshot=6)
    assert table.enter(1, 0, 7) == 6 and table.enter(1, 0, 5) == 0
    assert table.enter(1, 0, 9) == 9, "nothing was computed meanwhile"
    assert table.enter(1, 0, 6) == 6
    held(table, 1, 0, 2)
    assert table.enter(1, 0, 6) == 6, "it is kept"
    table.enter(1, 0, 0)
    held(table, 1, 0, 8)
    assert table.enter(1, 0, 6) == 0, "it was computed anew, without one"


def test_going_back_behind_what_waits_counts_from_what_was_computed() -> None:
    table = SlotTable(1, 20, Reach(True))
    table.enter(1, 0)
    held(table, 1, 0, 4)
    assert table.extend(TokenRun(1, 0, 4, 3)) and table.enter(1, 0, 7) == 4


def test_state_that_was_carried_here_ends_what_was_in_the_slot() -> None:
    table = SlotTable(2, 20, WINDOW)
    table.enter(2, 1)
    table.adopt(1, 1, 3, 9, 15)
    assert 2 not in table and table.holding(3) == [(1, 1, 9, 15)]
    assert table.enter(1, 1, 9, epoch=3) == 9 and table.enter(1, 1, 8, epoch=3) == 0, "it had held more"
    table.adopt(1, 0, 3, 12, 5)
    assert table.holding(3) == [(1, 0, 12, 12)] and not table.taken(1)
