"""The subproblem with the head on a given device: a ring of blocks from the source to the head and home."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.equal_blocks.block_problem import EqualBlocks, split_class
from peerllm.planner.routing.order_search import BlockRing
from peerllm.planner.routing.route_graph import CappedRoutes, RouteGraph, capped


@dataclass(frozen=True, slots=True)
class HeadPosition:
    """Routes whose head lies on a device of `head_class`; the head's bytes are reserved there."""

    blocks: EqualBlocks
    head_class: int
    unsplit_class: int  # its class before the split
    # With relays over any device, so that rings are lower bounds. "Layer" 0 is layers 0 and 1, the others are blocks.
    routes: CappedRoutes
    hop: Floats  # [classes, classes]: without relays
    home: Floats  # [classes]: from the last block through the head home, without relays
    can_relay: Flags  # [classes]: holds the two blocks that a relay needs, one for each visit (the source: one)


def head_positions(blocks: EqualBlocks) -> list[HeadPosition]:
    """One for each class that has room for the head."""
    return [_head_position(blocks, int(kind)) for kind in np.flatnonzero(blocks.capacity_with_head >= 0)]


def any_head_position(blocks: EqualBlocks) -> CappedRoutes:
    """Routes that cost no more than those of any head position: each takes the position that suits it best."""
    homes = np.where(blocks.capacity_with_head >= 0, blocks.relayed_head_hop + blocks.home, np.inf).min(axis=1)
    own = np.where(blocks.capacity_with_head >= 0, blocks.home, np.inf)
    return _block_routes(blocks, blocks.capacity, np.minimum(homes, own))


def _head_position(blocks: EqualBlocks, head_class: int) -> HeadPosition:
    """A class of several devices is split: only the device with the head has less room."""
    origin = head_class
    blocks, head_class = split_class(blocks, head_class)
    capacity = blocks.capacity.copy()
    capacity[head_class] = min(int(capacity[head_class]), int(blocks.capacity_with_head[head_class]))

    def home(table: Floats) -> Floats:
        homeward: Floats = table[:, head_class] + blocks.home[head_class]
        homeward[head_class] = blocks.home[head_class]
        return homeward

    routes = _block_routes(blocks, capacity, home(blocks.relayed_head_hop))
    can_relay = capacity >= np.where(np.arange(len(capacity)) == 0, 1, 2)
    return HeadPosition(blocks, head_class, origin, routes, blocks.hop, home(blocks.head_hop), can_relay)


def _block_routes(blocks: EqualBlocks, capacity: Ints, home: Floats) -> CappedRoutes:
    count, kinds = blocks.blocks, len(blocks.block_cost)
    placed = np.arange(count + 1)
    first = np.where(placed <= capacity[0], blocks.source_cost + placed * blocks.block_cost[0], np.inf)
    prefix = np.arange(count + 2) * blocks.block_cost[1:, None]
    fits = np.minimum(placed + capacity[1:, None] - 1, count)
    fits[:, 0] = -1

    hop = np.broadcast_to(blocks.relayed_hop[:, 1:], (count + 1, kinds, kinds - 1))
    return capped(RouteGraph(first, prefix, fits.astype(np.int64), hop, home[1:], blocks.class_size[1:]), np.inf)


def source_only_cost(position: HeadPosition) -> float:
    """The cost if the source holds every block."""
    return float(position.routes.first[-1] + position.home[0])


def block_ring(position: HeadPosition) -> BlockRing:
    """Its routes without relays, for the local search."""
    routes = position.routes
    room = np.maximum((routes.far - np.arange(routes.last + 1) + 1).max(axis=1), 0)
    own = int(np.isfinite(routes.first).sum()) - 1
    capacity, class_size = np.append(own, room), np.append(0, routes.graph.class_size)
    return BlockRing(
        routes.last,
        position.blocks.source_cost,
        position.blocks.block_cost,
        capacity,
        class_size,
        position.hop,
        position.home,
    )


def relayed_class_hops(position: HeadPosition, kind: Ints, available: Flags) -> tuple[Floats, int]:
    """([routes, classes]: the cheapest hop from class `kind` to any class over the `available` relays, work)."""
    hop: Floats = position.hop[kind]
    relays = np.flatnonzero(position.can_relay & position.blocks.useful_relay.any(axis=0) & available.any(axis=0))
    rounds = 0
    while rounds < len(relays):
        rounds += 1
        before = hop.copy()
        for r in relays:
            over = np.where(available[:, r], hop[:, r], np.inf)
            np.minimum(hop, over[:, None] + position.hop[r], out=hop)
        if (hop == before).all():
            break
    return hop, hop.size * (rounds * len(relays) + 1)
