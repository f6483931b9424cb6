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
    head_class: int
    unsplit_class: int  # its class before it was parted
    routes: CappedRoutes  # relays may be anyone's: its rings are bounds. "Layer" 0 stands for layers 0 and 1, the rest are blocks
    hop: Floats  # [classes, classes]: without relays
    home: Floats  # [classes]: from the last block through the head home, without relays
    can_relay: (
        Flags  # [classes]: can hold the two blocks a relay needs, one for each visit (the source, of layer 1, one)
    )


def head_positions(blocks: EqualBlocks) -> list[HeadPosition]:
    """One for each class that has room for the head."""
    return [_head_position(blocks, int(kind)) for kind in np.flatnonzero(blocks.capacity_with_head >= 0)]


def any_head_position(blocks: EqualBlocks) -> CappedRoutes:
    """What every house's rings cost at least, each ring with the place of the head that suits it."""
    homes = np.where(blocks.capacity_with_head >= 0, blocks.relayed_head_hop + blocks.home, np.inf).min(axis=1)
    own = np.where(blocks.capacity_with_head >= 0, blocks.home, np.inf)
    return _block_routes(blocks, blocks.capacity, np.minimum(homes, own))


def _head_position(blocks: EqualBlocks, head_class: int) -> HeadPosition:
    """A class of many is parted for its tail: only one of them has less room."""
    origin = head_class
    blocks, head_class = split_class(blocks, head_class)
    capacity = blocks.capacity.copy()
    capacity[head_class] = min(int(capacity[head_class]), int(blocks.capacity_with_head[head_class]))

    def home(table: Floats) -> Floats:
        route: Floats = table[:, head_class] + blocks.home[head_class]
        route[head_class] = blocks.home[head_class]
        return route

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
    """What it costs if the source holds every block."""
    return float(position.routes.first[-1] + position.home[0])


def block_ring(position: HeadPosition) -> BlockRing:
    """Its ways without relays."""
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
    """[ways, classes]: the cheapest hop from where each way is (class) to any class, over those `ready` as relays.

    And the work: array elements touched.
    """
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
