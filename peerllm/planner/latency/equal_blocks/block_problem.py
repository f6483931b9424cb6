"""The latency problem of a model with equal blocks, restated so that each device holds layers in one visit only.

Layers 0 and 1 lie on the source, the head (the last layer) anywhere, and between them are `blocks` equal blocks. A
route costs the time of the blocks that each device holds plus its hops, and a hop costs the same wherever it comes. So
if a device is visited several times, it does not matter which visit holds how many of its blocks, as long as each holds
at least one. Hence every route costs as much as one in which a device's first visit holds all its blocks and its later
visits, the relays, hold none. Such a route is real if no device has more relays than blocks less one (the source, which
also holds layer 1: no more than blocks). The search therefore enters each device at most once, with relays through
devices already used in between.

The head lies on the last visited device together with blocks, or it is entered by a hop of its own. It never pays to
put it beside blocks on a device that holds other blocks elsewhere: those blocks could join the others, because the hop
into the head is no dearer than a hop into a block (checked).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from peerllm.planner.arrays import Flags, Floats, Ints
from peerllm.planner.latency.assignment_problem import AssignmentProblem

FEWEST_LAYERS = 4


@dataclass(frozen=True, slots=True)
class EqualBlocks:
    """Arrays over classes of interchangeable devices; class 0 is the source alone."""

    blocks: int  # how many are to be placed
    source_cost: float  # cost of layers 0 and 1
    block_cost: Floats  # [classes]: cost of a block
    capacity: Ints  # [classes]: blocks that a device can hold
    capacity_with_head: Ints  # [classes]: blocks beside the head; -1 where the head does not fit
    hop: Floats  # [from, to]: between different devices; infinite within a class of one
    head_hop: Floats  # [from, to]: a hop into the head
    home: Floats  # [classes]: the head and the hop back to the source
    relayed_hop: Floats  # [from, to]: `hop` over the cheapest relays, used before or not
    relayed_head_hop: Floats  # [from, to]
    useful_relay: Flags  # [from, relay]: whether some hop is shorter over it
    members: tuple[tuple[int, ...], ...]  # [classes]: devices of each

    @property
    def class_size(self) -> Ints:
        return np.array([len(group) for group in self.members], dtype=np.int64)


def equal_blocks(problem: AssignmentProblem) -> EqualBlocks | None:
    """None unless all layers but 0, 1 and the last have equal costs, bytes and hops."""
    layers = len(problem.cost)
    if layers < FEWEST_LAYERS:
        return None
    cost, memory, hop = problem.cost[2:-1], problem.memory[2:-1], problem.hop[1:-2]
    if (cost != cost[0]).any() or (memory != memory[0]).any() or (hop != hop[0]).any():
        return None
    if (problem.hop[-2] > hop[0]).any():
        return None
    members = _classes(problem)
    first = np.array([group[0] for group in members])
    last = np.array([group[-1] for group in members])
    room = problem.room.copy()
    room[0] -= problem.memory[0, 0] + problem.memory[1, 0]
    count = layers - 3

    def held(left: Ints) -> Ints:
        complete = np.where(memory[0] > 0, left // np.maximum(memory[0], 1), count)
        return np.where(left < 0, -1, np.where(np.isfinite(cost[0]), np.minimum(complete, count), 0))

    def between(table: Floats) -> Floats:
        part: Floats = table[first[:, None], first[None, :]].copy()
        part[np.arange(len(first)), np.arange(len(first))] = np.where(first == last, np.inf, table[first, last])
        return part

    head = np.isfinite(problem.cost[-1]) & np.isfinite(problem.back)
    capacity = held(room)
    held_there = np.maximum(capacity, 0)[first]
    block_hop, head_hop = between(hop[0]), between(problem.hop[-2])
    single = np.array([len(group) == 1 for group in members])
    relayed_hop, relayed_head_hop, useful_relay = _relayed(block_hop, head_hop, held_there, single)
    return EqualBlocks(
        blocks=count,
        source_cost=float(problem.cost[0, 0] + problem.cost[1, 0]) if capacity[0] >= 0 else np.inf,
        block_cost=np.where(np.isfinite(cost[0]), cost[0], 0.0)[first],
        capacity=held_there,
        capacity_with_head=np.where(head, held(room - problem.memory[-1]), -1)[first],
        hop=block_hop,
        head_hop=head_hop,
        home=np.where(head, problem.cost[-1] + problem.back, np.inf)[first],
        relayed_hop=relayed_hop,
        relayed_head_hop=relayed_head_hop,
        useful_relay=useful_relay,
        members=members,
    )


def _relayed(hop: Floats, head_hop: Floats, capacity: Ints, single: Flags) -> tuple[Floats, Floats, Flags]:
    """(hops, hops into the head, which relays are useful from where), with relays where they are shorter.

    A relay needs a device that holds two blocks. It is never of the class before or after it: the route could start
    from that device directly, or end there.
    """
    relays = np.flatnonzero(capacity >= np.where(np.arange(len(capacity)) == 0, 1, 2))
    free = hop.copy()
    np.fill_diagonal(free, 0.0)
    for k in relays:
        free = np.minimum(free, free[:, k, None] + free[None, k, :])
    short, round_trip = free.copy(), np.full(len(hop), np.inf)
    into = head_hop.copy()
    useful_relay = np.zeros(hop.shape, dtype=bool)
    for k in relays:
        others = np.arange(len(hop)) != k
        round_trip[others] = np.minimum(round_trip, free[:, k] + free[k, :])[others]
        into = np.minimum(into, free[:, k, None] + head_hop[None, k, :])
        better = (hop[:, k, None] + hop[None, k, :] < hop) | (hop[:, k, None] + head_hop[None, k, :] < head_hop)
        useful_relay[:, k] = (better & ~np.diag(single)).any(axis=1) & others
    np.fill_diagonal(short, np.where(single, np.inf, np.minimum(np.diag(hop), round_trip)))
    np.fill_diagonal(into, np.where(single, np.inf, np.diag(into)))
    return short, into, useful_relay


def split_class(blocks: EqualBlocks, kind: int) -> tuple[EqualBlocks, int]:
    """(blocks with one device of class `kind` as a class of its own, the number of that class)."""
    group = blocks.members[kind]
    if len(group) == 1:
        return blocks, kind
    old = np.append(np.arange(len(blocks.members)), kind)
    members = (*blocks.members[:kind], group[1:], *blocks.members[kind + 1 :], group[:1])

    def apart(table: Floats) -> Floats:
        part: Floats = table[np.ix_(old, old)]
        part[-1, -1] = np.inf
        if len(group) == 2:
            part[kind, kind] = np.inf
        return part

    return replace(
        blocks,
        block_cost=blocks.block_cost[old],
        capacity=blocks.capacity[old],
        capacity_with_head=blocks.capacity_with_head[old],
        hop=apart(blocks.hop),
        head_hop=apart(blocks.head_hop),
        home=blocks.home[old],
        relayed_hop=apart(blocks.relayed_hop),
        relayed_head_hop=apart(blocks.relayed_head_hop),
        useful_relay=blocks.useful_relay[np.ix_(old, old)],
        members=members,
    ), len(members) - 1


def _classes(problem: AssignmentProblem) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = [[0]]
    marks: list[object] = [None]
    for j in range(1, len(problem.room)):
        ends = problem.memory[[2, -1], j].tobytes(), problem.cost[[2, -1], j].tobytes()
        mark = (int(problem.room[j]), *ends, float(problem.back[j]))
        for group, known in zip(groups, marks, strict=True):
            if mark == known and all(_alike(problem.hop[i], group[0], j) for i in (1, -2)):
                group.append(j)
                break
        else:
            groups.append([j])
            marks.append(mark)
    return tuple(tuple(group) for group in groups)


def _alike(hop: Floats, j: int, k: int) -> bool:
    others = np.ones(len(hop), dtype=bool)
    others[[j, k]] = False
    same = np.array_equal(hop[j, others], hop[k, others]) and np.array_equal(hop[others, j], hop[others, k])
    return bool(same and hop[j, k] == hop[k, j])
