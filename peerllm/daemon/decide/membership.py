"""Which devices of the household are online, whom to dial, which of two links to keep. `handle(event, now) -> actions`.

Both sides of a pair may dial. A link is named by who dialled it and by a number above those of all links that the
dialler knew between the two, so both sides see the same name and keep the same one of two: the one with the larger
number, of equal ones that dialled by the smaller device id.

Silence is not death: a device of which nothing was heard for SILENT_AFTER_S keeps its link and is dialled anew beside
it. It is offline when the connection closes, or after GRACE_S without a message over its link. A device whose
heartbeats come as datagrams while its link is quiet is slow, not silent: it is dialled anew as well, but stays online.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import assert_never

from peerllm.daemon.decide.membership_events import (
    Action,
    Address,
    Beat,
    Changed,
    Cut,
    Dial,
    DialFailed,
    Down,
    Event,
    Farewell,
    Heard,
    HeartbeatHeard,
    Incompatible,
    LinkName,
    Members,
    Retire,
    Sighted,
    State,
    Target,
    Tick,
    Up,
    Use,
)
from peerllm.types import DeviceId

HEARTBEAT_S = 0.25
SILENT_AFTER_S = 1.0  # without a sign of life: the device is silent
# Without a message over its link for so long, nobody waits for a device any longer. Devices and coordinators keep what
# is loaded for as long.
GRACE_S = 60.0
SLOW = f"busy or hard to reach: it is alive, but has sent nothing over its control link for {SILENT_AFTER_S:g} s"
STALL_S = 0.25  # a device that itself stood still this long gives the others as much time to be heard
BACKOFF_FIRST_S = 0.25
BACKOFF_MOST_S = 15.0
QUIET_BACKOFF_S = 1.0  # the longest wait between two dials of a device that may be back at any moment
BACKOFF_JITTER = 0.25  # share of the wait, either way
LARGER_WAIT_S = 0.3  # the larger device id lets the smaller dial first, so that duplicates are rare
MAX_HOSTS = 16  # addresses kept per device
MAX_STATIC = 64  # `--peer` addresses
STATIC_AGAIN_TRIES = 3  # failed dials of a device before the `--peer` address it once had is tried for itself
PATIENT_TRIES = 6  # backoff for a device that said goodbye or cannot be used: it will come by itself


@dataclass(slots=True)
class Attempt:
    """When to dial a target next."""

    due: float = 0.0
    tries: int = 0
    dialling: bool = False


@dataclass(slots=True)
class Member:
    """What is known of one device of the household."""

    device: DeviceId
    state: State = "offline"
    reason: str = "not seen yet"
    hosts: tuple[str, ...] = ()
    port: int = 0  # the first heard of, or what the device itself said over a link
    claimed: int = 0  # another port it was sighted at since; 0: none
    link: LinkName | None = None
    since: float = 0.0  # `link` stands
    heard: float = 0.0  # over the link or beside it
    link_heard: float = 0.0
    quiet: bool = False  # nothing came over the link for SILENT_AFTER_S
    beat: float = 0.0
    attempt: Attempt = field(default_factory=Attempt)


def backoff_s(me: DeviceId, target: Target, tries: int) -> float:
    """Bounded exponential wait before try number `tries` + 1, with a jitter that only depends on the arguments."""
    wait = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** min(tries, 16))
    digest = hashlib.sha256(f"{me}|{target}|{tries}".encode()).digest()
    share = int.from_bytes(digest[:4], "big") / 0xFFFFFFFF
    return wait * (1.0 + BACKOFF_JITTER * (2.0 * share - 1.0))


class Membership:
    """The state machine of one device; `members` may be read, never written, from outside."""

    def __init__(self, me: DeviceId, static: tuple[Address, ...] = ()) -> None:
        self.me = me
        self._members: dict[DeviceId, Member] = {}
        self.members: Mapping[DeviceId, Member] = self._members
        self._static: dict[Address, Attempt] = {address: Attempt() for address in static[:MAX_STATIC]}
        self._static_device: dict[Address, DeviceId] = {}
        self._ticked: float | None = None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; returns what is to be done, in order."""
        match event:
            case Members(devices):
                return self._set_members(devices, now)
            case Sighted():
                self._sight(event, now)
                return self._dials(now)
            case Up():
                return self._up(event, now)
            case DialFailed(target, reason):
                return self._failed(target, reason, now)
            case Incompatible(device, reason, target):
                return self._refused(device, reason, target, now)
            case Heard(link):
                return self._heard(link, now)
            case HeartbeatHeard(device):
                return self._heartbeat_heard(device, now)
            case Down(link, reason):
                return self._down(link, "offline", reason, now)
            case Farewell(link, reason):
                return [*self._down(link, "left", reason, now), Cut(link, "it said goodbye")]
            case Tick():
                return self._tick(now)
            case _:
                assert_never(event)

    def deadline(self) -> float | None:
        """When a Tick is wanted next; None if only an event can change anything."""
        times = [m.attempt.due for m in self._members.values() if self._wants_dial(m)]
        times += [a.due for address, a in self._static.items() if self._wants_static(address, a)]
        for member in self._members.values():
            if member.link is not None:
                times.append(member.beat + HEARTBEAT_S)
                times.append(member.link_heard + (GRACE_S if member.quiet else SILENT_AFTER_S))
                if member.state == "online":
                    times.append(member.heard + SILENT_AFTER_S)
        return min(times, default=None)

    def _of(self, link: LinkName) -> Member | None:
        return next((m for m in self._members.values() if m.link == link), None)

    def _set_state(self, member: Member, state: State, reason: str, renewed: bool = False) -> list[Action]:
        before, old_reason = member.state, member.reason
        member.state, member.reason = state, reason
        if (before, old_reason) == (state, reason) and not renewed:
            return []
        return [Changed(member.device, before, state, reason, renewed)]

    def _heard(self, link: LinkName, now: float) -> list[Action]:
        member = self._of(link)
        if member is None:
            return []
        member.heard = member.link_heard = now
        member.quiet = False
        return self._set_state(member, "online", "")

    def _heartbeat_heard(self, device: DeviceId, now: float) -> list[Action]:
        member = self._members.get(device)
        if member is None or member.link is None:
            return []
        member.heard = now
        return self._set_state(member, "online", SLOW if member.quiet else "")

    def _set_members(self, devices: frozenset[DeviceId], now: float) -> list[Action]:
        actions: list[Action] = []
        for device in [d for d in self._members if d not in devices]:
            member = self._members.pop(device)
            if member.link is not None:
                actions.append(Cut(member.link, "it is no longer of the household"))
            actions.append(Changed(device, member.state, "left", "removed from the household"))
        for device in sorted(devices - self._members.keys() - {self.me}):
            member = self._members[device] = Member(device)
            member.attempt.due = now + (LARGER_WAIT_S if self.me > device else 0.0)
        return [*actions, *self._dials(now)]

    def _sight(self, event: Sighted, now: float) -> None:
        for member in self._members.values():
            if not member.device.startswith(event.prefix):
                continue
            # What worked before stays in the list: anyone may claim an address for a device by mDNS.
            worked = member.hosts[:1]
            member.hosts = tuple(dict.fromkeys((*worked, *event.hosts, *member.hosts)))[:MAX_HOSTS]
            if member.port in (0, event.port):
                member.port = event.port
            else:
                member.claimed = event.port
            if event.fresh and self._unheard(member):
                first = now + (LARGER_WAIT_S if self.me > member.device else 0.0)
                member.attempt.tries = min(member.attempt.tries, 1)
                member.attempt.due = min(member.attempt.due, first)
            if member.link is None and member.reason == "not seen yet":
                member.state, member.reason = "connecting", ""

    def _up(self, event: Up, now: float) -> list[Action]:
        if event.target is not None:
            self._settle(event.target, event.device, now)
        member = self._members.get(event.device)
        if member is None:
            return [Cut(event.link, "not of the household")]
        if event.host:
            member.hosts = tuple(dict.fromkeys((event.host, *member.hosts)))[:MAX_HOSTS]
        member.port, member.claimed = event.port or member.port, 0
        old = member.link
        if old is not None and not self._better(event.link, member, old):
            return [Retire(event.link)]
        # The other side dials beside a link that stands if it has not heard this one for a while. Two links that come
        # up at the same time only mean that both dialled.
        unheard = event.link.dialler == member.device and now - member.since >= SILENT_AFTER_S
        renewed = old is None or member.quiet or unheard
        member.link, member.since, member.quiet = event.link, now, False
        member.heard = member.link_heard = member.beat = now
        actions: list[Action] = [Use(event.device, event.link), *self._set_state(member, "online", "", renewed)]
        return [*actions, Retire(old)] if old is not None else actions

    @staticmethod
    def _better(new: LinkName, member: Member, old: LinkName) -> bool:
        if member.quiet and new.dialler == member.device:
            return True  # it knows nothing of the old link any more, for it may have started again with another clock
        return (-new.number, new.dialler) < (-old.number, old.dialler)

    def _settle(self, target: Target, device: DeviceId | None, now: float) -> None:
        """A dial has ended; `device` is who answered, None if nobody did."""
        if isinstance(target, tuple):
            attempt = self._static.get(target)
            if device is not None and attempt is not None:
                self._static_device[target] = device
        else:
            member = self._members.get(target)
            attempt = member.attempt if member is not None else None
        if attempt is None:
            return
        attempt.dialling = False
        if device is None or (not isinstance(target, tuple) and target != device):
            wait = backoff_s(self.me, target, attempt.tries)
            quiet = not isinstance(target, tuple) and self._members[target].quiet
            attempt.due = now + (min(wait, QUIET_BACKOFF_S) if quiet else wait)
            attempt.tries += 1
        else:
            attempt.tries = 0

    def _failed(self, target: Target, reason: str, now: float) -> list[Action]:
        self._settle(target, None, now)
        member = None if isinstance(target, tuple) else self._members.get(target)
        if member is None or member.link is not None:
            return []
        return self._set_state(member, "left" if member.state == "left" else "offline", reason)

    def _refused(self, device: DeviceId, reason: str, target: Target | None, now: float) -> list[Action]:
        if target is not None:
            self._settle(target, None, now)
        member = self._members.get(device)
        if member is None or member.link is not None:
            return []
        member.attempt.tries = max(member.attempt.tries, PATIENT_TRIES)  # it takes an update, not a retry
        member.attempt.due = now + backoff_s(self.me, device, member.attempt.tries)
        return self._set_state(member, "offline", reason)

    def _down(self, link: LinkName, state: State, reason: str, now: float) -> list[Action]:
        member = self._of(link)
        if member is None:
            return []
        member.link, member.quiet = None, False
        member.attempt.tries = PATIENT_TRIES if state == "left" else 0
        wait = LARGER_WAIT_S if self.me > member.device else 0.0
        member.attempt.due = now + backoff_s(self.me, member.device, member.attempt.tries) + wait
        return self._set_state(member, state, reason)

    def _tick(self, now: float) -> list[Action]:
        if self._ticked is not None and now - self._ticked > HEARTBEAT_S + STALL_S:
            for member in self._members.values():
                least = now - SILENT_AFTER_S + STALL_S
                member.heard, member.link_heard = max(member.heard, least), max(member.link_heard, least)
        self._ticked = now
        actions: list[Action] = []
        for member in list(self._members.values()):
            link = member.link
            if link is None:
                continue
            if now - member.link_heard >= GRACE_S:
                reason = f"silent for {GRACE_S:g} s"
                actions += [Cut(link, reason), *self._down(link, "offline", reason, now)]
                continue
            if now - member.link_heard >= SILENT_AFTER_S and not member.quiet:
                member.quiet = True
                member.attempt.due = now + (LARGER_WAIT_S if self.me > member.device else 0.0)
            if now - member.heard >= SILENT_AFTER_S:
                actions += self._set_state(member, "silent", f"silent for {SILENT_AFTER_S:g} s")
            elif member.quiet and member.state == "online":
                actions += self._set_state(member, "online", SLOW)
            if now - member.beat >= HEARTBEAT_S:
                member.beat = now
                actions.append(Beat(link))
        return [*actions, *self._dials(now)]

    @staticmethod
    def _unheard(member: Member) -> bool:
        return member.link is None or member.quiet

    def _wants_dial(self, member: Member) -> bool:
        return self._unheard(member) and not member.attempt.dialling and bool(member.hosts) and member.port > 0

    def _wants_static(self, address: Address, attempt: Attempt) -> bool:
        member = self._members.get(self._static_device.get(address, ""))
        # The device's own address list has this one; the address itself is only tried again if it may be another's now.
        lost = member is None or (self._unheard(member) and member.attempt.tries >= STATIC_AGAIN_TRIES)
        return bool(self._members) and not attempt.dialling and lost

    def _dials(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for member in self._members.values():
            if self._wants_dial(member) and member.attempt.due <= now:
                member.attempt.dialling = True
                claims = member.claimed and member.attempt.tries % 2 == 0
                actions.append(Dial(member.device, member.hosts, member.claimed if claims else member.port))
        for address, attempt in self._static.items():
            if self._wants_static(address, attempt) and attempt.due <= now:
                attempt.dialling = True
                actions.append(Dial(address, (address[0],), address[1]))
        return actions
