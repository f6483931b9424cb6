"""Numbers as a person reads them."""

from __future__ import annotations

import pytest

from peerllm.cli.terminal import human_ms, human_rate


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ms"),
        (0.004, "0 ms"),
        (0.42, "0.42 ms"),
        (0.5, "0.5 ms"),
        (0.994, "0.99 ms"),
        (0.996, "1.0 ms"),
        (7.12, "7.1 ms"),
        (9.96, "10 ms"),
        (58.3, "58 ms"),
        (999.4, "999 ms"),
        (999.6, "1.0 s"),
        (5140, "5.1 s"),
        (43_210, "43 s"),
        (599_000, "599 s"),
        (600_000, "10 min"),
        (90_000_000, "1,500 min"),
    ],
)
def test_times(value: float, text: str) -> None:
    assert human_ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123, "0.12"), (8.712, "8.71"), (9.96, "10.0"), (17.94, "17.9"), (99.96, "100"), (12_345.6, "12,346")],
)
def test_rates(value: float, text: str) -> None:
    assert human_rate(value) == text
