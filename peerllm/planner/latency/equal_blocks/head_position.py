"""One place of the head: the blocks as a ring from the source to there, as short as any relays could make it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.equal_blocks.block_problem import EqualBlocks, split_class
from peerllm.planner.routing.order_search import BlockRing
from peerllm.planner.routing.route_graph import CappedRoutes, RouteGraph, capped


@dataclass(frozen=True, slots=True)
class HeadPosition:
    """The ways whose head lies on `tail`, whether that holds blocks as well or not: its room is kept for it."""

    blocks: EqualBlocks
    tail: int
    tail_of: int  # its class before it was parted
    limits: CappedRoutes  # relays may be anyone's: its rings are bounds. "Layer" 0 stands for layers 0 and 1, the rest are blocks
    hop: Floats  # [classes, classes]: without relays
    home: Floats  # [classes]: from the last block through the head home, without relays
    able: Flags  # [classes]: can hold the two blocks a relay needs, one for each visit (the source, of layer 1, one)


def head_positions(blocks: EqualBlocks) -> list[HeadPosition]:
    """One for each class that has room for the head."""
    return [_head_position(blocks, int(kind)) for kind in np.flatnonzero(blocks.cap_head >= 0)]


def any_head_position(blocks: EqualBlocks) -> CappedRoutes:
    """What every house's rings cost at least, each ring with the place of the head that suits it."""
    homes = np.where(blocks.cap_head >= 0, blocks.short_head_hop + blocks.home, np.inf).min(axis=1)
    own = np.where(blocks.cap_head >= 0, blocks.home, np.inf)
    return _block_routes(blocks, blocks.cap, np.minimum(homes, own))


def _head_position(blocks: EqualBlocks, tail: int) -> HeadPosition:
    """A class of many is parted for its tail: only one of them has less room."""
    origin = tail
    blocks, tail = split_class(blocks, tail)
    cap = blocks.cap.copy()
    cap[tail] = min(int(cap[tail]), int(blocks.cap_head[tail]))

    def home(table: Floats) -> Floats:
        way: Floats = table[:, tail] + blocks.home[tail]
        way[tail] = blocks.home[tail]
        return way

    limits = _block_routes(blocks, cap, home(blocks.short_head_hop))
    able = cap >= np.where(np.arange(len(cap)) == 0, 1, 2)
    return HeadPosition(blocks, tail, origin, limits, blocks.hop, home(blocks.head_hop), able)


def _block_routes(blocks: EqualBlocks, cap: Ints, home: Floats) -> CappedRoutes:
    count, kinds = blocks.blocks, len(blocks.each)
    placed = np.arange(count + 1)
    first = np.where(placed <= cap[0], blocks.base + placed * blocks.each[0], np.inf)
    prefix = np.arange(count + 2) * blocks.each[1:, None]
    fits = np.minimum(placed + cap[1:, None] - 1, count)
    fits[:, 0] = -1

    hop = np.broadcast_to(blocks.short_hop[:, 1:], (count + 1, kinds, kinds - 1))
    return capped(RouteGraph(first, prefix, fits.astype(np.int64), hop, home[1:], blocks.many[1:]), np.inf)


def source_only_cost(house: HeadPosition) -> float:
    """What it costs if the source holds every block."""
    return float(house.limits.first[-1] + house.home[0])


def block_ring(house: HeadPosition) -> BlockRing:
    """Its ways without relays."""
    limits = house.limits
    room = np.maximum((limits.far - np.arange(limits.last + 1) + 1).max(axis=1), 0)
    own = int(np.isfinite(limits.first).sum()) - 1
    cap, many = np.append(own, room), np.append(0, limits.chain.many)
    return BlockRing(limits.last, house.blocks.base, house.blocks.each, cap, many, house.hop, house.home)


def relayed_class_hops(house: HeadPosition, kind: Ints, ready: Flags) -> tuple[Floats, int]:
    """[ways, classes]: the cheapest hop from where each way is (class) to any class, over those `ready` as relays.

    And the work: array elements touched.
    """
    hop: Floats = house.hop[kind]
    relays = np.flatnonzero(house.able & house.blocks.useful.any(axis=0) & ready.any(axis=0))
    rounds = 0
    while rounds < len(relays):
        rounds += 1
        before = hop.copy()
        for r in relays:
            over = np.where(ready[:, r], hop[:, r], np.inf)
            np.minimum(hop, over[:, None] + house.hop[r], out=hop)
        if (hop == before).all():
            break
    return hop, hop.size * (rounds * len(relays) + 1)
