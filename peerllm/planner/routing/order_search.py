"""Iterated local search for a good order of devices when all blocks are equal.

Given the devices, the blocks are filled into the fastest first, so a solution is just an order of devices. It costs the
time of the blocks plus the hops between neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from peerllm.planner.arrays import Floats, Ints

PERTURBATIONS = 160  # tried at most
VAIN_PERTURBATIONS = 60  # end after so many in a row without gain
ALL_SEGMENTS = 32  # devices up to which segments of any length are reversed; beyond, only single ones move
SEGMENT = 3  # devices moved together, at most
BUDGET = 12_000_000  # end after so many array elements touched
GAIN = 1e-9  # relative
FIRST_SEARCHES = 2  # searches in which a first order is sought

DeviceOrder = Ints  # [visits]: classes, without the source


@dataclass(frozen=True, slots=True)
class BlockRing:
    """Equal blocks to be placed on devices between the source (class 0) and home; infinite where there is no link."""

    count: int  # blocks
    source_cost: float  # what must lie on the source
    block_cost: Floats  # [classes]: cost of a block
    capacity: Ints  # [classes]: blocks that one device holds
    class_size: Ints  # [classes]: devices of the class; 0 for the source
    hop: Floats  # [classes, classes]
    home: Floats  # [classes]: from the last block home


class OrderSearch:
    """Local search over the device orders of one ring; `work` counts the array elements touched."""

    def __init__(self, ring: BlockRing) -> None:
        self.ring, self.work = ring, 0
        self._block_cost, self._capacity, self._class_size, self._count = (
            ring.block_cost,
            ring.capacity,
            ring.class_size,
            ring.count,
        )
        self._usable = (ring.capacity > 0) & (ring.class_size > 0)

    def start(self, promising: Sequence[int]) -> DeviceOrder | None:
        """A first order with room for all blocks, or None.

        `promising` classes come first, then those cheapest per block, hop included.
        """
        into = self.ring.hop.min(axis=0, initial=np.inf)
        pace = self._block_cost + into / np.maximum(self._capacity, 1)
        taken = np.zeros(len(self._capacity), dtype=np.int64)
        order: list[int] = []
        left = self._count - int(self._capacity[0])
        for kind in (*promising, *np.repeat(np.argsort(pace), self._class_size[np.argsort(pace)])):
            if left <= 0 and order:
                break
            if self._usable[kind] and taken[kind] < self._class_size[kind]:
                order.append(int(kind))
                taken[kind] += 1
                left -= int(self._capacity[kind])
        return np.array(order, dtype=np.int64) if left <= 0 and order else None

    def cost(self, orders: Ints) -> Floats:
        """[orders]: the least cost of each order [orders, visits]; infinite where its devices have too little room."""
        return self._compute(orders) + self._hops(orders)

    def improved(self, order: DeviceOrder) -> tuple[DeviceOrder, float]:
        """Move to the best neighbour until none is better: a local optimum and its cost."""
        cost = float(self.cost(order[None])[0])
        while True:
            best, better = cost * (1 - GAIN), None
            for orders, same_devices in self._neighbours(order):
                if not len(orders):
                    continue
                self.work += orders.size
                compute = self._compute(order[None]) if same_devices else self._compute(orders)
                costs = compute + self._hops(orders)
                place = int(costs.argmin())
                if costs[place] < best:
                    best, better = float(costs[place]), orders[place]
            if better is None:
                return order, cost
            order, cost = better, best

    def blocks_per_visit(self, order: DeviceOrder) -> Ints:
        """[1 + visits]: blocks on the source and on each device of `order`."""
        share = np.append(0, np.ones(len(order), dtype=np.int64))
        kinds = np.append(0, order)
        left = self._count - len(order)
        for place in np.argsort(self._block_cost[kinds], kind="stable"):
            more = min(left, int(self._capacity[kinds[place]] - share[place]))
            share[place] += more
            left -= more
        return share

    def perturbed(self, order: DeviceOrder, rng: np.random.Generator) -> DeviceOrder:
        """Swap two adjacent segments, or replace up to SEGMENT devices by unused ones."""
        count = len(order)
        spare = np.flatnonzero(self._usable & (np.bincount(order, minlength=len(self._class_size)) < self._class_size))
        if count >= 3 and (not len(spare) or rng.random() < 0.5):
            a, b, c = np.sort(rng.choice(count + 1, 3, replace=False))
            return np.concatenate([order[:a], order[b:c], order[a:b], order[c:]])
        order = order.copy()
        picked = rng.permutation(spare)[:SEGMENT]
        places = rng.permutation(count)[: len(picked)]
        order[places] = picked[: len(places)]
        return order

    def _compute(self, orders: Ints) -> Floats:
        kinds = np.hstack([np.zeros((len(orders), 1), dtype=np.int64), orders])
        block_cost, room = self._block_cost[kinds], self._capacity[kinds]
        room[:, 1:] -= 1  # every visit holds at least one block
        left = self._count - orders.shape[1]
        rank = np.argsort(block_cost, axis=1, kind="stable")
        filled = np.minimum(np.take_along_axis(room, rank, axis=1).cumsum(axis=1), left)
        extra = np.diff(filled, axis=1, prepend=0)
        cost = (
            self.ring.source_cost
            + block_cost[:, 1:].sum(axis=1)
            + (extra * np.take_along_axis(block_cost, rank, axis=1)).sum(axis=1)
        )
        held = (filled[:, -1] >= left) & (left >= 0) & (room >= 0).all(axis=1)
        return np.where(held, cost, np.inf).astype(np.float64)

    def _hops(self, orders: Ints) -> Floats:
        hop = self.ring.hop
        total: Floats = hop[0, orders[:, 0]] + self.ring.home[orders[:, -1]]
        total += hop[orders[:, :-1], orders[:, 1:]].sum(axis=1)
        return total

    def _neighbours(self, order: DeviceOrder) -> list[tuple[Ints, bool]]:
        """Pairs of (orders, same devices as before): reordered; one device added, replaced, removed."""
        count = len(order)
        spare = np.flatnonzero(self._usable & (np.bincount(order, minlength=len(self._class_size)) < self._class_size))
        found = [(order[_reorderings(count)], True)] if count > 1 else []
        place, new = (x.ravel() for x in np.meshgrid(np.arange(count + 1), spare, indexing="ij"))
        columns = np.arange(count + 1)[None, :]
        before, at = columns < place[:, None], columns == place[:, None]
        padded, shifted = np.append(order, 0), np.append(0, order)
        found.append((np.where(at, new[:, None], np.where(before, padded, shifted)), False))
        replaced = np.where(at, new[:, None], padded)[:, :count]
        found.append((replaced[place < count], False))
        if count > 1:
            column = np.arange(count - 1)[None, :]
            found.append((np.where(column < np.arange(count)[:, None], order[:-1], order[1:]), False))
        return found


@lru_cache(maxsize=64)
def _reorderings(count: int) -> Ints:
    """[orders, count]: a segment moved, forwards or reversed; two devices swapped; a segment reversed."""
    plain = list(range(count))
    found = set()
    for first in range(count):
        for last in range(first + 1, count + 1 if count <= ALL_SEGMENTS else first + 2):
            part, rest = plain[first:last], plain[:first] + plain[last:]
            found.add((*plain[:first], *part[::-1], *plain[last:]))
            if last - first <= SEGMENT:
                for into in range(len(rest) + 1):
                    found.add((*rest[:into], *part, *rest[into:]))
                    found.add((*rest[:into], *part[::-1], *rest[into:]))
            if last < count:
                swapped = plain.copy()
                swapped[first], swapped[last] = swapped[last], swapped[first]
                found.add(tuple(swapped))
    found.discard(tuple(plain))
    return np.array(sorted(found), dtype=np.int64).reshape(-1, count)


def iterated_local_search(
    searches: Sequence[OrderSearch], promising: Sequence[int], budget: int = BUDGET
) -> tuple[OrderSearch, DeviceOrder] | None:
    """A good order and the search in whose ring it costs least, or None if no order has room.

    `searches` are sorted, the most promising first.
    """
    best, order, at = np.inf, None, None
    for search in searches[:FIRST_SEARCHES]:
        first = search.start(promising)
        if first is not None:
            found, cost = search.improved(first)
            if cost < best:
                best, order, at = cost, found, search
    if order is None or at is None:
        return None
    rng, vain = np.random.default_rng(0), 0
    for _ in range(PERTURBATIONS):
        for search in searches:  # the same order may cost less in another ring
            alike = (
                len(search.ring.class_size) == len(at.ring.class_size)
                and (search.ring.class_size == at.ring.class_size).all()
            )
            if alike and (cost := float(search.cost(order[None])[0])) < best:
                best, at = cost, search
        found, cost = at.improved(at.perturbed(order, rng))
        vain += 1
        if cost < best * (1 - GAIN):
            best, order, vain = cost, found, 0
        if vain > VAIN_PERTURBATIONS or sum(search.work for search in searches) > budget:
            break
    return at, order
