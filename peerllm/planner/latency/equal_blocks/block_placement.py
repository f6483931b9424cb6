"""From the fresh visits of a walk to a device for each layer: every relay is handed one block of its device's."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.planner.arrays import Floats
from peerllm.planner.latency.equal_blocks.head_position import HeadPosition
from peerllm.planner.latency.relay_path import cheapest_relays
from peerllm.planner.routing.route_graph import Route


@dataclass(slots=True)
class _Visit:
    kind: int  # class, 0: the source
    member: int  # which of the class
    blocks: int
    first: int  # place of the device's first visit in the walk


def placement_of_route(position: HeadPosition, route: Route, *, relays: bool = True) -> tuple[int, ...] | None:
    """A device for every layer, over relays where they are shorter; None if a relay has no block to hand out."""
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
    """Blocks that the first visit of a device can hand out: the source has layer 1 there besides."""
    return visits[place].blocks - (1 if place else 0)


def _relay(position: HeadPosition, visits: list[_Visit], onward: Floats) -> bool:
    """Append the cheapest way over devices already visited, if any is cheaper than going `onward` at once."""
    best: dict[int, int] = {}  # by class, the member's first visit with most to hand out
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
