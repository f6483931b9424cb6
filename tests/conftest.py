"""Garbage collection for a run of thousands of tests, and what hypothesis is told for all of them."""

from __future__ import annotations

import gc

from hypothesis import settings

ALLOCATIONS = 20_000  # between two collections; with 700, simulated rings spend a third of their time in them

settings.register_profile("any machine", deadline=None)  # no test depends on a clock's speed
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: later collections leave them out, which else takes half a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS)
