"""What single observations make of a link's figures; what downloads of several readers amount to."""

from __future__ import annotations

import math

import pytest

from peerllm.daemon.network.speed.link_estimates import FORGET_S, SMALL_BYTES, SPAN_BYTES, LinkEstimate, Meter

SMALL, LARGE = 2048, 64 << 10


def took(nbytes: int, latency_ms: float, mbps: float) -> float:
    return latency_ms / 1e3 + nbytes * 8e-6 / mbps


def timed(latency_ms: float, mbps: float, large: int = 4) -> list[tuple[int, float]]:
    sizes = [SMALL] * 8 + [LARGE] * large
    return [(size, took(size, latency_ms, mbps)) for size in sizes]


def test_an_echo_tells_latency_and_rate_apart() -> None:
    link = LinkEstimate()
    assert (link.latency_ms, link.mbps, link.at) == (None, None, None)
    busy = [(SMALL, 5.0), (LARGE, 5.0)]  # a moment in which the machine did something else
    link.echoed([*timed(0.4, 100.0), *busy], 7.0)
    assert link.latency_ms == pytest.approx(0.4, rel=1e-6) and link.mbps == pytest.approx(100.0, rel=1e-6)
    assert (link.at, link.source) == (7.0, "measured")


def test_without_large_frames_the_rate_is_known_from_elsewhere() -> None:
    link = LinkEstimate()
    link.probed(1.0, 1.0)
    link.echoed([(256, took(256, 2.0, 1.0))] * 3, 2.0)
    assert link.latency_ms == pytest.approx(2.0) and link.mbps == pytest.approx(1.0)


def test_frames_of_requests_move_the_estimate_to_what_they_take() -> None:
    link = LinkEstimate()
    link.echoed(timed(0.2, 100.0), 0.0)
    for step in range(60):
        link.framed(SMALL, took(SMALL, 0.6, 50.0), 1.0 + step)
        link.framed(LARGE, took(LARGE, 0.6, 50.0), 1.0 + step)
    assert link.latency_ms == pytest.approx(0.6, rel=0.05) and link.mbps == pytest.approx(50.0, rel=0.05)
    assert link.source == "traffic" and link.at == 60.0
    link.framed(SMALL, 30.0, 61.0)  # one frame of many was held up: it counts, but not for all
    assert link.latency_ms < 30_000 / 7


def test_a_large_frame_that_was_quick_tells_nothing_of_the_rate() -> None:
    link = LinkEstimate()
    link.echoed(timed(10.0, 100.0), 0.0)
    link.framed(SMALL_BYTES + 1, 0.0101, 1.0)
    assert link.mbps == pytest.approx(100.0)


def test_old_estimates_yield_to_the_first_new_observation() -> None:
    link = LinkEstimate()
    for step in range(20):
        link.framed(SMALL, 0.001, float(step))
    link.framed(SMALL, 0.009, 19.0 + FORGET_S)
    assert link.latency_ms == pytest.approx(9.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e9])
def test_impossible_observations_change_nothing(seconds: float) -> None:
    link = LinkEstimate()
    link.echoed(timed(0.5, 100.0), 0.0)
    link.framed(SMALL, seconds, 1.0)
    link.framed(LARGE, seconds, 1.0)
    link.carried(1 << 20, seconds, seconds, 1.0)
    link.carried(0, 1.0, 1.0, 1.0)
    link.echoed([(SMALL, seconds)], 1.0)
    link.probed(seconds if not 0 < seconds < math.inf else -1.0, 1.0)
    assert link.latency_ms == pytest.approx(0.5) and link.mbps == pytest.approx(100.0)


def test_downloads_count_where_the_link_was_what_they_waited_for() -> None:
    link = LinkEstimate()
    link.probed(100.0, 0.0)
    link.carried(1 << 20, 1.0, 0.2, 1.0)  # the reader was slow, not the link
    assert link.mbps == pytest.approx(100.0) and link.source == "measured"
    for second in range(40):
        link.carried(1_250_000, 1.0, 0.95, 1.0 + second)  # 10 Mbps
    assert link.mbps == pytest.approx(10.0, rel=0.1) and link.source == "traffic" and link.doubtful
    link.probed(80.0, 50.0)
    assert link.mbps == pytest.approx(80.0) and not link.doubtful
    for second in range(40):
        link.carried(25_000_000, 1.0, 0.1, 51.0 + second)  # more than was thought possible, whoever waited
    assert link.mbps == pytest.approx(200.0, rel=0.1) and not link.doubtful


def test_a_meter_adds_up_readers_and_their_waits() -> None:
    meter = Meter()
    meter.opened(0.0)
    meter.opened(0.0)
    meter.waits(0.0)
    meter.waits(0.0)
    assert meter.came(SPAN_BYTES // 2, 0.4) is None  # too little yet
    assert meter.came(SPAN_BYTES, 0.5) == (SPAN_BYTES // 2 + SPAN_BYTES, 0.5, pytest.approx(0.5))
    meter.waits(1.0)  # half a second in which neither waited
    assert meter.came(SPAN_BYTES, 1.5) == (SPAN_BYTES, 1.0, pytest.approx(0.5))
    meter.closed(1.6)
    meter.closed(1.6)
    meter.opened(100.0)  # what lies between does not count
    meter.waits(100.0)
    assert meter.came(SPAN_BYTES, 101.0) == (SPAN_BYTES, 1.0, pytest.approx(1.0))
