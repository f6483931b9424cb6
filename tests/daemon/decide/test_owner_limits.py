"""Every reason not to lend: when it begins, what is done about it and when it is over, by an injected clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peerllm.daemon.decide.owner_limits import (
    CALM_S,
    FAREWELL_S,
    HOT_S,
    HOT_STEP,
    LESS_S,
    SHORT_S,
    SPARE_BYTES,
    Elapsed,
    Going,
    Holds,
    LendNoMore,
    LetGo,
    LimitsSet,
    MachineRead,
    OwnerDecider,
    OwnerLimits,
    SayLeaving,
    StartEngineAnew,
    hours_text,
    within,
)

GB = 10**9
LENT = 4 * GB
NONE = OwnerLimits(battery_percent=None)
EVERY_S = 5.0


class Device:
    """A decider with a clock; `read` tells it of the machine every EVERY_S until `seconds` are over."""

    def __init__(self, limits=NONE, promised=GB):
        self.decider, self.now = OwnerDecider(limits), 0.0
        assert self.decider.handle(Holds(promised, LENT), self.now) == []

    def handle(self, event):
        return self.decider.handle(event, self.now)

    def read(self, seconds=0.0, **machine):
        found = self.handle(MachineRead(**machine))
        end = self.now + seconds
        while self.now < end:
            self.now += EVERY_S
            found += self.handle(MachineRead(**machine))
        return found


def test_without_limits_nothing_but_full_memory_moves_it():
    device = Device()
    for machine in ({}, {"celsius": 120.0}, {"battery_percent": 1.0}, {"minute": 100, "available_bytes": 9 * GB}):
        assert device.read(600, **machine) == []
    assert device.decider.deadline() is None


def test_pausing_is_a_farewell_and_resuming_ends_it():
    device = Device()
    paused = replace(NONE, paused=True)
    assert device.handle(LimitsSet(paused)) == [SayLeaving("paused by its owner")]
    assert device.handle(LimitsSet(paused)) == []  # said once
    assert device.decider.deadline() == FAREWELL_S
    device.now = FAREWELL_S - 0.1
    assert device.handle(Elapsed()) == []
    device.now = FAREWELL_S
    assert device.handle(Elapsed()) == [LetGo("paused by its owner")]
    assert device.decider.deadline() is None
    assert device.handle(Elapsed()) == []  # once
    assert device.handle(Holds(0, LENT)) == []
    assert device.handle(LimitsSet(NONE)) == [SayLeaving("")]
    assert device.decider.leaving == ""


def test_who_holds_nothing_any_more_lets_nothing_go():
    device = Device()
    device.handle(LimitsSet(replace(NONE, paused=True)))
    assert device.handle(Holds(0, LENT)) == [] and device.decider.deadline() is None
    device.now = 10 * FAREWELL_S
    assert device.handle(Elapsed()) == []


def test_a_second_pause_has_its_own_time():
    device = Device()
    device.handle(LimitsSet(replace(NONE, paused=True)))
    device.now = FAREWELL_S - 1
    device.handle(LimitsSet(NONE))
    assert device.handle(LimitsSet(replace(NONE, paused=True))) == [SayLeaving("paused by its owner")]
    assert device.decider.deadline() == 2 * FAREWELL_S - 1


def test_it_starts_paused_where_it_was_paused_before():
    decider = OwnerDecider(replace(NONE, paused=True))
    assert decider.handle(Holds(0, LENT), 0.0) == [SayLeaving("paused by its owner")]


def test_hours():
    device = Device(replace(NONE, hours=(20 * 60, 8 * 60 + 30)))
    assert device.read(minute=20 * 60) == [] and device.read(minute=8 * 60 + 29) == []
    assert device.read(minute=8 * 60 + 30) == [SayLeaving("paused: it lends from 20:00 to 8:30 only")]
    assert device.read(minute=19 * 60 + 59) == []
    assert device.read(minute=20 * 60) == [SayLeaving("")]


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ((540, 1020), (540, 1019), (539, 1020, 0)),
        ((1320, 360), (1320, 1439, 0, 359), (360, 1319)),
        ((0, 1440), (0, 1439), ()),
    ],
)
def test_hours_may_run_over_midnight(hours, inside, outside):
    assert all(within(hours, minute) for minute in inside)
    assert not any(within(hours, minute) for minute in outside)
    assert hours_text((20 * 60, 5)) == "20:00 to 0:05"


def test_on_battery_it_leaves_below_the_level_and_is_back_some_percent_above_it():
    device = Device(replace(NONE, battery_percent=30))
    assert device.read(battery_percent=30.0) == []
    assert device.read(battery_percent=29.4) == [SayLeaving("paused: on battery, 29 %")]
    assert device.read(battery_percent=20.0) == []  # the text stays: no news for each percent
    assert device.read(battery_percent=34.9) == []
    assert device.read(battery_percent=35.0) == [SayLeaving("")]
    assert device.read(battery_percent=34.0) == []
    assert device.read(battery_percent=10.0) == [SayLeaving("paused: on battery, 10 %")]
    assert device.read(battery_percent=None) == [SayLeaving("")]  # plugged in
    assert OwnerLimits().battery_percent == 15


def test_heat_has_to_last_and_so_has_coolness():
    device = Device(replace(NONE, hot_celsius=90.0))
    assert device.read(HOT_S - EVERY_S, celsius=95.0) == []
    assert device.read(celsius=89.0) == []
    assert device.read(HOT_S, celsius=90.0) == [SayLeaving("paused: too hot, 90 °C")]
    device.handle(Holds(0, LENT))
    assert device.read(600, celsius=90.0 - HOT_STEP + 1) == []
    assert device.read(CALM_S - EVERY_S, celsius=90.0 - HOT_STEP) == []
    assert device.read(celsius=90.0 - HOT_STEP + 1) == []  # from the beginning
    assert device.read(CALM_S, celsius=50.0) == [SayLeaving("")]


def test_a_limit_of_heat_that_is_taken_back_counts_no_more():
    device = Device(replace(NONE, hot_celsius=90.0))
    device.read(HOT_S, celsius=95.0)
    device.handle(LimitsSet(NONE))
    assert device.read(celsius=95.0) == [SayLeaving("")]


def test_full_memory_first_stops_lending_more_and_then_ends_lending():
    device = Device()
    full = {"available_bytes": SPARE_BYTES - 1}
    assert device.read(LESS_S - EVERY_S, **full) == []
    assert device.read(available_bytes=SPARE_BYTES) == []
    assert device.read(LESS_S, **full) == [LendNoMore(True)]
    assert device.read(SHORT_S - LESS_S, **full) == [SayLeaving("paused: its memory is needed by other programs")]
    device.handle(Holds(0, LENT))
    # What it let go of is available now, but others still have what they took.
    assert device.read(600, available_bytes=SPARE_BYTES - 1 + GB) == []
    assert device.read(CALM_S - EVERY_S, available_bytes=SPARE_BYTES + GB) == []
    assert device.read(EVERY_S, available_bytes=SPARE_BYTES + GB) == [SayLeaving(""), LendNoMore(False)]


def test_memory_that_is_short_for_a_moment_only_stops_lending_more():
    device = Device()
    assert device.read(LESS_S, available_bytes=1) == [LendNoMore(True)]
    assert device.read(CALM_S - EVERY_S, available_bytes=SPARE_BYTES) == []
    assert device.read(EVERY_S, available_bytes=SPARE_BYTES) == [LendNoMore(False)]


def test_a_full_machine_on_which_nothing_is_held_leaves_nothing():
    device = Device(promised=0)
    assert device.read(600, available_bytes=1) == [LendNoMore(True)]


def test_what_is_held_beyond_a_lowered_limit_is_left_and_the_rest_lent_again():
    device = Device()
    assert device.handle(Holds(GB, GB)) == []
    assert device.handle(Holds(GB, GB - 1)) == [SayLeaving("it lends less memory now")]
    device.now = FAREWELL_S
    assert device.handle(Elapsed()) == [LetGo("it lends less memory now")]
    assert device.handle(Holds(0, GB - 1)) == [SayLeaving("")]


def test_other_processors_come_with_another_engine_when_nothing_is_held():
    device = Device()
    assert device.handle(LimitsSet(replace(NONE, threads=2))) == [SayLeaving("it lends other processors now")]
    assert device.handle(Holds(1, LENT)) == []
    assert device.handle(Holds(0, LENT)) == [StartEngineAnew(), SayLeaving("")]
    assert device.handle(LimitsSet(replace(NONE, threads=2))) == []
    assert device.handle(LimitsSet(replace(NONE, threads=3))) == [StartEngineAnew()]  # at once


def test_processors_changed_and_changed_back_cost_no_engine():
    device = Device()
    device.handle(LimitsSet(replace(NONE, threads=2)))
    assert device.handle(LimitsSet(NONE)) == [SayLeaving("")]


def test_going_down_comes_before_everything_and_whoever_ends_it_sets_its_time():
    device = Device()
    assert device.handle(Going("going down")) == [SayLeaving("going down")]
    assert device.decider.deadline() is None
    device.now = 10 * FAREWELL_S
    assert device.handle(Elapsed()) == []
    device = Device(replace(NONE, battery_percent=30))
    device.read(battery_percent=10.0)
    device.now = 10.0
    assert device.handle(Going("going down")) == [SayLeaving("going down")]
    assert device.decider.deadline() == FAREWELL_S  # what began before goes on
    assert device.handle(Going("")) == [SayLeaving("paused: on battery, 10 %")]


def test_a_farewell_of_many_reasons_ends_in_the_time_of_the_first():
    device = Device(replace(NONE, battery_percent=30))
    for second in range(0, 200, 5):
        device.now = float(second)
        paused = second % 2 == 1
        found = device.handle(LimitsSet(replace(NONE, battery_percent=30, paused=paused)))
        found += device.handle(MachineRead(battery_percent=10.0))
        if any(isinstance(one, LetGo) for one in found):
            break
    assert device.now == FAREWELL_S


def test_woken_up_it_lends_again():
    device = Device()
    assert device.handle(Going("going to sleep")) == [SayLeaving("going to sleep")]
    device.now = 9000.0
    assert device.handle(Going("")) == [SayLeaving("")]
    assert device.decider.deadline() is None
