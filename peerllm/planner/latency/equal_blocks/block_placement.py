"""From a route to a device for each layer: every relay is handed one block of its device."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.planner.arrays import Floats
from peerllm.planner.latency.equal_blocks.head_position import HeadPosition
from peerllm.planner.latency.relay_path import cheapest_relays
from peerllm.planner.routing.route_graph import Route


@dataclass(slots=True)
class _Visit:
    """A visit or a relay, while blocks are handed out."""

    kind: int  # class, 0: the source
    member: int  # number within the class
    blocks: int
    first: int  # index of the device's first visit


def placement_of_route(position: HeadPosition, route: Route, *, relays: bool = True) -> tuple[int, ...] | None:
    """A device for each layer, over relays where they are shorter; None if a relay has no block to take."""
    visits: list[_Visit] = []
    taken = [0] * len(position.blocks.members)
    before = 0
    for visit in route:
        kind = visit.kind + 1
        if visits and relays and not _relay(position, visits, position.hop[:, kind]):
            return None
        visits.append(_Visit(kind, taken[kind], visit.last - before, len(visits)))
        taken[kind], before = taken[kind] + 1, visit.last
    if relays and not _relay(position, visits, position.home):
        return None
    members = position.blocks.members
    placement = [members[0][0]] * 2
    for visit_ in visits:
        placement += [members[visit_.kind][visit_.member]] * visit_.blocks
    return (*placement, members[position.head_class][0])


def _spare(visits: list[_Visit], place: int) -> int:
    """Blocks that a device's first visit can give to relays: it keeps one, but the source has layer 1 to keep."""
    return visits[place].blocks - (1 if place else 0)


def _relay(position: HeadPosition, visits: list[_Visit], onward: Floats) -> bool:
    """Append the cheapest relays before the hop `onward`, if any; False if one has no block to take."""
    best: dict[int, int] = {}  # by class, the first visit that has most blocks to give
    for place, visit in enumerate(visits):
        if visit.first == place and position.can_relay[visit.kind]:
            other = best.get(visit.kind)
            if other is None or _spare(visits, place) > _spare(visits, other):
                best[visit.kind] = place
    for kind in cheapest_relays(position.hop, visits[-1].kind, list(best), onward):
        place = best[kind]
        if _spare(visits, place) < 1:
            return False
        visits[place].blocks -= 1
        visits.append(_Visit(kind, visits[place].member, 1, place))
    return True
