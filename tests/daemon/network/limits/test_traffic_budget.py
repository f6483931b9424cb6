"""The budget of one device, with a clock in the test's hand."""

from __future__ import annotations

import pytest

from peerllm.daemon.network.limits.traffic_budget import (
    BURST_S,
    BUSY_SHARE,
    BYTES_PER_S,
    MESSAGE_BYTES,
    TrafficBudget,
)


def flood(nbytes: int, busy_s: float, seconds: float) -> int:
    """Messages that are read in this time, sent as fast as they are taken."""
    budget, now, count = TrafficBudget(0.0), 0.0, 0
    while (now := now + budget.wait_s(now)) <= seconds:
        budget.spend(nbytes, busy_s, now)
        count += 1
        now += busy_s
    return count


@pytest.mark.parametrize("nbytes", [0, 100, 60_000, 16 << 20])
def test_in_the_long_run_so_many_bytes_a_second_are_read_and_a_burst_before(nbytes: int) -> None:
    counted = nbytes + MESSAGE_BYTES
    assert flood(nbytes, 0.0, 100.0) * counted == pytest.approx((100.0 + BURST_S) * BYTES_PER_S, abs=counted)


def test_messages_that_keep_the_device_busy_get_a_share_of_its_time() -> None:
    assert flood(100, 0.05, 100.0) * 0.05 == pytest.approx((100.0 + BURST_S) * BUSY_SHARE, rel=0.1)


def test_one_that_behaves_never_waits_and_saves_no_more_than_a_burst() -> None:
    budget = TrafficBudget(0.0)
    for step in range(10_000):
        assert budget.wait_s(step / 8) == 0.0
        budget.spend(2000, 0.001, step / 8)
    now = 1e6
    budget.spend(int(BURST_S * BYTES_PER_S) - MESSAGE_BYTES, 0.0, now)
    assert budget.wait_s(now) == 0.0
    budget.spend(BYTES_PER_S - MESSAGE_BYTES, 0.0, now)
    assert budget.wait_s(now) == pytest.approx(1.0)
    assert budget.wait_s(now + 1.0) == 0.0
