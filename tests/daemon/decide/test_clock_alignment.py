"""Clocks put beside each other: whatever the ways cost, the error is at most what is said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerllm.daemon.decide.clock_alignment import Alignment, Reading, quickest

DELAY = st.integers(0, 10**10)  # ns of one way
TRIP = st.tuples(st.integers(0, 10**9), DELAY, DELAY)  # pause before it, way there, way back
OFFSET = st.integers(-(10**18), 10**18)


def readings(offset, trips, now=10**15):
    """What questions and answers over those ways show of a clock that is `offset` ahead."""
    found = []
    for pause, there, back in trips:
        sent = now + pause
        now = sent + there + back
        found.append(Reading(sent, sent + there + offset, now))
    return found, now


@given(OFFSET, st.lists(TRIP, min_size=1, max_size=20))
def test_the_offset_errs_by_half_the_least_round_trip_at_most(offset, trips):
    found, _ = readings(offset, trips)
    best = quickest(found)
    least = min(there + back for _, there, back in trips)
    assert best.error_ns == (least + 1) // 2
    assert abs(best.offset_ns - offset) <= best.error_ns


@given(OFFSET, st.lists(TRIP, min_size=1, max_size=5), st.lists(TRIP, min_size=1, max_size=5), st.data())
def test_between_two_readings_no_moment_errs_by_more_than_said(offset, before, after, data):
    first, now = readings(offset, before)
    last, _ = readings(offset, after, now + data.draw(st.integers(0, 10**10)))
    clock = Alignment(quickest(first), quickest(last))
    low, high = clock.before.there_ns, clock.after.there_ns
    moments = sorted(data.draw(st.lists(st.integers(low, max(low, high)), max_size=10)))
    here = [clock.here(there) for there in moments]
    assert here == sorted(here), "what came first there does so here"
    for there, found in zip(moments, here, strict=True):
        assert abs(found - (there - offset)) <= clock.error_ns + 1


@given(st.integers(-1000, 1000), st.integers(1, 600))
def test_a_clock_that_runs_faster_is_followed(ppm, seconds):
    """Without it a minute at 50 ppm would be 3 ms off, more than many a hop."""

    def there(at):
        return 5 * 10**12 + at + at * ppm // 10**6

    length = seconds * 10**9
    clock = Alignment(Reading(0, there(0), 0), Reading(length, there(length), length))
    for at in (0, length // 3, length):
        assert abs(clock.here(there(at)) - at) <= 2
    assert abs(clock.drift * 1e6 - ppm) < 0.1


def test_readings_that_cannot_be_are_no_crash():
    back = Alignment(Reading(100, 50, 120), Reading(10, 40, 20))
    assert back.drift == 0.0 and back.here(60) == 120
