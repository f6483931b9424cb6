"""Labels (partial routes that end with a visit), and the dominance rule that drops those no optimum needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints

COMPARED_PAIRWISE = 256  # labels up to which every pair is compared; beyond, only equivalent ones


@dataclass(frozen=True, slots=True)
class Labels:
    """Partial routes, as columns."""

    device: Ints  # [labels]
    left: Ints  # [labels, devices]: room that later layers could fill
    used: Flags  # [labels, devices]
    visited: Flags  # [labels, devices]: visited in the current run; none after its last layer
    available: Flags  # [labels, devices]: can be relays in the current run, or out of it
    cost: Floats  # [labels]
    parent: Ints  # [labels]: row of the parent label

    def at(self, rows: Ints | Flags) -> Labels:
        """The labels in `rows`."""
        return Labels(*(getattr(self, each.name)[rows] for each in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Labels]) -> Labels:
        """All labels of `parts`."""
        return Labels(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Labels)))


class Dominance:
    """Finds equivalent labels: on one device, with the same room left and the same devices visited in the run."""

    def __init__(self, devices: int) -> None:
        self._left, self._visited, self._available = np.random.default_rng(0).integers(1, 2**62, (3, devices)) | 1
        self._devices = devices

    def undominated(self, labels: Labels) -> Ints:
        """Rows of labels that no equivalent one beats in both cost and relays; of few labels, that none dominates."""
        key: Ints = (labels.left * self._left).sum(axis=1) + (labels.visited * self._visited).sum(axis=1)
        key = key * np.int64(self._devices + 1) + labels.device
        order, first = _grouped(key, labels.cost)
        keep: Ints = order[first]
        if labels.available.any():
            best = keep[first.cumsum() - 1]  # for each label, the cheapest of the equivalent ones
            more = (labels.available[order] & ~labels.available[best]).any(axis=1)
            keep = order[first | more]
            full = key[keep] + (labels.available[keep] * self._available).sum(axis=1)
            again, first = _grouped(full, labels.cost[keep])
            keep = keep[again[first]]
        if len(keep) <= COMPARED_PAIRWISE:
            keep = keep[_undominated(labels.at(keep))]
        return keep


def _grouped(key: Ints, cost: Floats) -> tuple[Ints, Flags]:
    """Rows sorted by key and cost; which of them are the first of their key."""
    order = np.lexsort((cost, key))
    return order, np.append(True, np.diff(key[order]) != 0)


def _undominated(labels: Labels) -> Flags:
    """False where another label on the same device is at least as good in everything (of equals the first stays)."""
    one, two = np.s_[:, None], np.s_[None, :]
    better = (labels.device[one] == labels.device[two]) & (labels.cost[one] <= labels.cost[two])
    better &= (labels.left[one] >= labels.left[two]).all(axis=2)
    better &= (labels.visited[one] <= labels.visited[two]).all(axis=2) & (
        labels.available[one] >= labels.available[two]
    ).all(axis=2)
    equal = better & better.T
    rows = np.arange(len(labels.device))
    better &= ~(equal & (rows[one] >= rows[two]))
    beaten: Flags = better.any(axis=0)
    return ~beaten
