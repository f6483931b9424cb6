"""Which loaded shards a stage is made of. Engines go by it, and daemons foresee with it what an engine will load."""

from __future__ import annotations

from collections.abc import Iterable

Layers = tuple[int, int]  # first and last, both included


def reused(stage: Layers, loaded: Iterable[Layers]) -> tuple[list[Layers], list[Layers]]:
    """(loaded shards that lie within the stage, runs of its layers that none of them has), by first layer."""
    used, missing = list[Layers](), list[Layers]()
    layer, last = stage
    for first, end in sorted(loaded, key=lambda one: (one[0], -one[1])):
        if first < layer or end > last:
            continue
        if first > layer:
            missing.append((layer, first - 1))
        used.append((first, end))
        layer = end + 1
    if layer <= last:
        missing.append((layer, last))
    return used, missing
