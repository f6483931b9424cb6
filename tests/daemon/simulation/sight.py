"""What a device hears of the others: by the real membership, or by a plain model of it that is faster."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Protocol

from peerllm.daemon.decide import membership_events as by
from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.membership import GRACE_S, SILENT_AFTER_S, Membership
from peerllm.daemon.decide.membership_events import LinkName

if TYPE_CHECKING:
    from tests.daemon.simulation.coordinating_device import CoordinatingDevice

SILENT_S, OFFLINE_S = SILENT_AFTER_S, GRACE_S
DIAL_S = 0.5  # until nobody answers


class Sight(Protocol):
    def start(self) -> None: ...

    def look(self, name: str) -> None:
        """A path, a connection or a process changed: find out what is heard now."""
        ...

    def connected(self, name: str) -> bool: ...

    def condition(self, name: str) -> on.DeviceCondition: ...


class PlainSight:
    """Silent after a second, gone after a minute or when the connection breaks, online when it answers again."""

    def __init__(self, house: CoordinatingDevice) -> None:
        self._house = house
        self._others = [name for name in house.machines if name != house.source_name]
        first: on.DeviceCondition = "gone" if house.machines[house.source_name].born else "online"
        self._condition = dict.fromkeys(self._others, first)
        self._unheard: dict[str, float | None] = dict.fromkeys(self._others)  # since when
        self._resets = {name: house.paths.resets(name, house.source_name) for name in self._others}

    def start(self) -> None:
        for name in self._others:
            if self._condition[name] == "online":
                self._house.become(name, "online")
            else:
                self.look(name)

    def condition(self, name: str) -> on.DeviceCondition:
        return self._condition[name]

    def _breaks(self, name: str) -> int:
        return self._house.paths.resets(name, self._house.source_name)

    def connected(self, name: str) -> bool:
        return self._condition[name] != "gone" and self._breaks(name) == self._resets[name]

    def look(self, name: str) -> None:
        house = self._house
        open_now = house.paths.open(name, house.source_name) and not house.machines[house.source_name].frozen
        broken = not house.machines[name].alive or self._breaks(name) != self._resets[name]
        if open_now and broken and self._condition[name] == "online":
            house.at_source(0.01, lambda: self._closed(name))
        if open_now and house.answers_now(name):
            if self._unheard[name] is not None or self._condition[name] != "online" or broken:
                self._unheard[name] = None
                house.at_source(house.random.choice((0.02, 0.1, 0.4)), lambda: self._heard(name))
        elif self._unheard[name] is None:
            since = self._unheard[name] = house.time.now
            house.at_source(SILENT_S, lambda: self._silent(name, since))
            house.at_source(OFFLINE_S, lambda: self._offline(name, since))

    def _closed(self, name: str) -> None:
        if self._condition[name] != "gone" and not (self.connected(name) and self._house.machines[name].alive):
            self._become(name, "gone", f"{name}: connection closed")

    def _heard(self, name: str) -> None:
        anew = self._condition[name] == "gone" or self._breaks(name) != self._resets[name]
        if self._unheard[name] is None and (anew or self._condition[name] != "online"):
            self._resets[name] = self._breaks(name)
            self._become(name, "online", "", anew)

    def _silent(self, name: str, since: float) -> None:
        if self._unheard[name] == since and self._condition[name] == "online":
            self._become(name, "silent", f"{name} is silent")

    def _offline(self, name: str, since: float) -> None:
        if self._unheard[name] == since and self._condition[name] != "gone":
            self._become(name, "gone", f"{name} was silent for a minute")

    def _become(self, name: str, condition: on.DeviceCondition, reason: str, renewed: bool = False) -> None:
        self._condition[name] = condition
        self._house.become(name, condition, reason, renewed)


class MembershipSight:
    """The real one of the source; devices answer its heartbeats and dials, and dial nobody themselves."""

    def __init__(self, house: CoordinatingDevice) -> None:
        self._house, self._me = house, house.source_name
        self._membership = Membership(self._me)
        self._numbers = count(1)
        self._links: dict[LinkName, tuple[str, int]] = {}  # the device, and the breaks before it stood
        self._ticks = 0

    def start(self) -> None:
        others = [name for name in self._house.machines if name != self._me]
        self._take(by.Members(frozenset(others)))
        for name in others:
            self._up(name)

    def condition(self, name: str) -> on.DeviceCondition:
        state = self._membership.members[name].state
        return "online" if state == "online" else "silent" if state == "silent" else "gone"

    def connected(self, name: str) -> bool:
        link = self._membership.members[name].link
        return link is not None and self._stands(link)

    def _stands(self, link: LinkName) -> bool:
        if link not in self._links:
            return False
        name, breaks = self._links[link]
        return self._house.machines[name].alive and self._house.paths.resets(name, self._me) == breaks

    def look(self, name: str) -> None:
        link = self._membership.members[name].link
        if link is not None and not self._stands(link) and self._house.paths.open(name, self._me):
            self._house.at_source(0.01, lambda: self._take(by.Down(link, "connection closed")))

    def _up(self, name: str, target: str | None = None) -> None:
        link = LinkName(self._me, next(self._numbers))
        self._links[link] = name, self._house.paths.resets(name, self._me)
        self._take(by.Up(link, name, "host", 1, target))

    def _take(self, event: by.Event) -> None:
        now = self._house.time.now
        for action in self._membership.handle(event, now):
            self._do(action)
        self._ticks += 1
        number, due = self._ticks, self._membership.deadline()
        if due is not None:
            self._house.at_source(max(due - now, 0.001), lambda: self._tick(number))

    def _tick(self, number: int) -> None:
        if number == self._ticks:
            self._take(by.Tick())

    def _do(self, action: by.Action) -> None:
        house = self._house
        match action:
            case by.Dial(target):
                assert isinstance(target, str)
                there = house.paths.open(target, self._me) and house.answers_now(target)
                refused = not house.machines[target].alive and house.paths.open(target, self._me)
                house.at_source(0.03 if there or refused else DIAL_S, lambda: self._dialled(target))
            case by.Beat(link) if self._stands(link):
                name, channel = self._links[link][0], f"link {link.number}"
                house.paths.send(
                    self._me,
                    name,
                    lambda: house.paths.send(name, self._me, lambda: self._heard(link), channel),
                    channel,
                )
            case by.Changed(device, before, state, reason, renewed):
                if before != state or renewed:
                    house.become(device, self.condition(device), f"{device}: {reason or state}", renewed)
            case by.Cut(link):
                self._links.pop(link, None)
            case _:
                pass  # what is retired is closed later

    def _heard(self, link: LinkName) -> None:
        self._take(by.Heard(link))

    def _dialled(self, target: str) -> None:
        if self._house.paths.open(target, self._me) and self._house.answers_now(target):
            self._up(target, target)
        else:
            self._take(by.DialFailed(target, "nobody answers"))
