"""The quick measurement of a device."""

from __future__ import annotations

import time

from peerllm.engine.measure import compute_speed
from peerllm.engine.messages import Measure


def test_measures_quickly():
    start = time.perf_counter()
    got = compute_speed.measure(Measure(7))
    assert time.perf_counter() - start < 5  # 0.5 s on an idle machine
    assert got.request == 7 and set(got.gbytes_per_s) == set(got.gflops) == {"float32"}
    assert all(0.01 < value < 1e5 for value in (*got.gbytes_per_s.values(), *got.gflops.values()))


def test_the_fastest_run_counts(monkeypatch):
    now = [0.0]
    costs = iter([5.0, 1.0, 3.0])
    monkeypatch.setattr(compute_speed.time, "perf_counter", lambda: now[0])
    assert compute_speed.best_s(lambda: now.__setitem__(0, now[0] + next(costs)), budget_s=6.0) == 1.0
