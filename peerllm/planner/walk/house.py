"""One place of the head: the blocks as a ring from the source to there, as short as any relays could make it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peerllm.planner.problem import Floats, Ints
from peerllm.planner.ring.chain import Chain, Limits, limited
from peerllm.planner.ring.local import Round
from peerllm.planner.walk.blocks import Blocks, Flags, split


@dataclass(frozen=True, slots=True)
class House:
    """The ways whose head lies on `tail`, whether that holds blocks as well or not: its room is kept for it."""

    blocks: Blocks
    tail: int
    tail_of: int  # its class before it was parted
    limits: (
        Limits  # relays may be anyone's: its rings are bounds. "Layer" 0 stands for layers 0 and 1, the rest are blocks
    )
    hop: Floats  # [classes, classes]: without relays
    home: Floats  # [classes]: from the last block through the head home, without relays
    able: Flags  # [classes]: can hold the two blocks a relay needs, one for each visit (the source, of layer 1, one)


def houses(blocks: Blocks) -> list[House]:
    """One for each class that has room for the head."""
    return [_house(blocks, int(kind)) for kind in np.flatnonzero(blocks.cap_head >= 0)]


def any_house(blocks: Blocks) -> Limits:
    """What every house's rings cost at least, each ring with the place of the head that suits it."""
    homes = np.where(blocks.cap_head >= 0, blocks.short_head_hop + blocks.home, np.inf).min(axis=1)
    own = np.where(blocks.cap_head >= 0, blocks.home, np.inf)
    return _limits(blocks, blocks.cap, np.minimum(homes, own))


def _house(blocks: Blocks, tail: int) -> House:
    """A class of many is parted for its tail: only one of them has less room."""
    origin = tail
    blocks, tail = split(blocks, tail)
    cap = blocks.cap.copy()
    cap[tail] = min(int(cap[tail]), int(blocks.cap_head[tail]))

    def home(table: Floats) -> Floats:
        way: Floats = table[:, tail] + blocks.home[tail]
        way[tail] = blocks.home[tail]
        return way

    limits = _limits(blocks, cap, home(blocks.short_head_hop))
    able = cap >= np.where(np.arange(len(cap)) == 0, 1, 2)
    return House(blocks, tail, origin, limits, blocks.hop, home(blocks.head_hop), able)


def _limits(blocks: Blocks, cap: Ints, home: Floats) -> Limits:
    count, kinds = blocks.blocks, len(blocks.each)
    placed = np.arange(count + 1)
    first = np.where(placed <= cap[0], blocks.base + placed * blocks.each[0], np.inf)
    prefix = np.arange(count + 2) * blocks.each[1:, None]
    fits = np.minimum(placed + cap[1:, None] - 1, count)
    fits[:, 0] = -1

    hop = np.broadcast_to(blocks.short_hop[:, 1:], (count + 1, kinds, kinds - 1))
    return limited(Chain(first, prefix, fits.astype(np.int64), hop, home[1:], blocks.many[1:]), np.inf)


def alone(house: House) -> float:
    """What it costs if the source holds every block."""
    return float(house.limits.first[-1] + house.home[0])


def round_of(house: House) -> Round:
    """Its ways without relays."""
    limits = house.limits
    room = np.maximum((limits.far - np.arange(limits.last + 1) + 1).max(axis=1), 0)
    own = int(np.isfinite(limits.first).sum()) - 1
    cap, many = np.append(own, room), np.append(0, limits.chain.many)
    return Round(limits.last, house.blocks.base, house.blocks.each, cap, many, house.hop, house.home)


def reach(house: House, kind: Ints, ready: Flags) -> tuple[Floats, int]:
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
