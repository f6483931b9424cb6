"""Labels of partial ways, and which of many at one layer are worth going on with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints

COMPARED_PAIRWISE = 256  # labels up to which every pair is compared; beyond, only those with the same room left


@dataclass(frozen=True, slots=True)
class Labels:
    """Ways up to the last layer of a visit."""

    device: Ints  # [labels]
    left: Ints  # [labels, devices]: room that layers behind could fill
    used: Flags  # [labels, devices]
    visited: Flags  # [labels, devices]: visited in the run at hand; none behind its last layer
    available: Flags  # [labels, devices]: can be relays in the run, or out of it
    cost: Floats  # [labels]
    parent: Ints  # [labels]: row of the label before

    def at(self, rows: Ints | Flags) -> Labels:
        return Labels(*(getattr(self, each.name)[rows] for each in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Labels]) -> Labels:
        return Labels(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Labels)))


class Dominance:
    """Finds labels with the same way ahead: on one device, with the same room left and the same devices visited."""

    def __init__(self, devices: int) -> None:
        self._left, self._visited, self._available = np.random.default_rng(0).integers(1, 2**62, (3, devices)) | 1
        self._devices = devices

    def cheapest(self, labels: Labels) -> Ints:
        """Rows of labels that none alike beats in both cost and relays."""
        key: Ints = (labels.left * self._left).sum(axis=1) + (labels.visited * self._visited).sum(axis=1)
        key = key * np.int64(self._devices + 1) + labels.device
        order, first = _grouped(key, labels.cost)
        keep: Ints = order[first]
        if labels.available.any():
            best = keep[first.cumsum() - 1]  # of those alike, for each
            more = (labels.available[order] & ~labels.available[best]).any(axis=1)
            keep = order[first | more]
            full = key[keep] + (labels.available[keep] * self._available).sum(axis=1)
            again, first = _grouped(full, labels.cost[keep])
            keep = keep[again[first]]
        if len(keep) <= COMPARED_PAIRWISE:
            keep = keep[_undominated(labels.at(keep))]
        return keep


def _grouped(key: Ints, cost: Floats) -> tuple[Ints, Flags]:
    """Rows by key and cost; which of them are the first of their key."""
    order = np.lexsort((cost, key))
    return order, np.append(True, np.diff(key[order]) != 0)


def _undominated(labels: Labels) -> Flags:
    """False for a label that another on the same device beats or equals in everything (the first wins)."""
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
