"""What counts as growth, and what does not."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak_trend import slope, trend

MB = 1e6


def every_3_s(values):
    return [(3.0 * n, float(value)) for n, value in enumerate(values)]


def test_a_slope_is_not_moved_by_jumps():
    straight = every_3_s(range(0, 300, 6))
    assert slope(straight) == pytest.approx(2.0)
    jumpy = [(when, value + (1e6 if n % 9 == 4 else 0)) for n, (when, value) in enumerate(straight)]
    assert slope(jumpy) == pytest.approx(2.0, rel=0.1)
    assert slope([(0.0, 5.0)]) == 0.0


@pytest.mark.parametrize(
    ("counted", "values", "grows"),
    [
        ("memory", [300 * MB + 40_000 * n for n in range(200)], True),  # 13 kB/s
        ("memory", [300 * MB + 4_000 * n for n in range(200)], False),
        ("memory", [100 * MB + min(n, 90) * MB for n in range(200)], False),  # a cache that fills, then no more
        ("tasks", [60 + n // 20 for n in range(200)], True),
        ("files", [30 + n // 50 for n in range(200)], False),
        ("files", [30 + n // 25 for n in range(200)], True),
        ("threads", [8 + n // 60 for n in range(200)], True),
        ("threads", [8 + n % 2 for n in range(200)], False),
    ],
)
def test_growth_is_told_from_noise(counted, values, grows):
    noise = random.Random(1)
    sway = 0.2 * MB if counted == "memory" else 0
    series = every_3_s(value + noise.uniform(-sway, sway) for value in values)
    assert trend("laptop engine", counted, series).grows is grows
