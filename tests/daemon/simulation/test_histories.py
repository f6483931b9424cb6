"""Thousands of histories of faults, each from a seed: PEERLLM_SEED=N replays one and says all that happened in it."""

from __future__ import annotations

import os

import pytest

from tests.daemon.simulation.history import LONG, LOSSES, SUCCESSION, History, WrongHistoryError

QUICK = 60
SHARE = 1_000
FULL = 10_000


def history(seed: int) -> History:
    return History(seed, LOSSES, LONG, succession=True) if seed % SUCCESSION == 1 else History(seed)


def run(seeds: range) -> None:
    for seed in seeds:
        try:
            history(seed).run()
        except WrongHistoryError as error:
            pytest.fail(f"PEERLLM_SEED={seed}: {error}")


def test_some_histories() -> None:
    seed = os.environ.get("PEERLLM_SEED")
    run(range(QUICK) if seed is None else range(int(seed), int(seed) + 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_histories() -> None:
    run(range(QUICK, FULL if os.environ.get("PEERLLM_FULL") == "1" else SHARE))
