"""What this device knows of the others of its household: their Hello, their last DeviceView, their last addresses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from peerllm.daemon.control_messages import DeviceView, Hello, Place, Whereabouts
from peerllm.daemon.decide.membership import Member
from peerllm.daemon.decide.membership_events import Sighted
from peerllm.daemon.discovery.advert import SHORT_ID_DIGITS, printable_name
from peerllm.daemon.network.network_files import Known
from peerllm.daemon.network.peer import Peer
from peerllm.transport.roster.entry import RosterEntry
from peerllm.transport.roster.roster import MAX_MEMBERS
from peerllm.types import DeviceId

MAX_HINTS = 4  # addresses of one device that are passed on or taken
MAX_HOST_CHARS = 64


def whereabouts(members: Iterable[Member]) -> Whereabouts:
    """What may be passed on of where these devices are: a zone would name one of this device's own interfaces."""
    hosts = [(member, tuple(host for host in member.hosts if "%" not in host)[:MAX_HINTS]) for member in members]
    return Whereabouts(tuple(Place(member.device, usable, member.port) for member, usable in hosts if usable))


class PeerStore:
    """By device; `where` is what is kept on disk."""

    def __init__(self, known: tuple[Known, ...]) -> None:
        self.known: dict[DeviceId, Known] = {one.device: one for one in known}
        self.hellos: dict[DeviceId, Hello] = {}
        self.views: dict[DeviceId, DeviceView] = {}

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Forget every other device."""
        self.known = {device: known for device, known in self.known.items() if device in devices}
        self.hellos = {device: hello for device, hello in self.hellos.items() if device in devices}
        self.views = {device: view for device, view in self.views.items() if device in devices}

    def where(self, members: Mapping[DeviceId, Member], names: Mapping[DeviceId, RosterEntry]) -> tuple[Known, ...]:
        """Where each device is or was last, brought up to date."""
        for device, member in members.items():
            if member.hosts and device in names:
                self.known[device] = Known(
                    device, names[device].name, member.hosts, member.port, self._data_port(device)
                )
        return tuple(self.known[device] for device in sorted(self.known))

    def sighted(self, device: DeviceId) -> Sighted | None:
        """Where the device was last."""
        known = self.known.get(device)
        return Sighted(device[:SHORT_ID_DIGITS], known.hosts, known.control_port) if known is not None else None

    def hinted(self, said: Whereabouts, members: Mapping[DeviceId, RosterEntry]) -> list[Sighted]:
        """Another device's hints about members, to be tried; remembered for those never reached."""
        hints = []
        for place in said.places[:MAX_MEMBERS]:
            hosts = tuple(host for host in place.hosts if len(host) <= MAX_HOST_CHARS)[:MAX_HINTS]
            if place.device in members and 0 < place.control_port < 65536 and hosts:
                known = Known(place.device, members[place.device].name, hosts, place.control_port, 0)
                self.known.setdefault(place.device, known)
                hints.append(Sighted(place.device[:SHORT_ID_DIGITS], hosts, place.control_port))
        return hints

    def peer(self, entry: RosterEntry, member: Member | None, rtt_ms: float | None, mbps: float | None) -> Peer:
        """Everything known of one device."""
        hello = self.hellos.get(entry.device)
        return Peer(
            device=entry.device,
            name=printable_name(hello.name) if hello else entry.name,
            state=member.state if member else "offline",
            hello=hello,
            view=self.views.get(entry.device),
            hosts=member.hosts if member else (),
            control_port=member.port if member else 0,
            data_port=self._data_port(entry.device),
            rtt_ms=rtt_ms,
            mbps=mbps,
            problem=member.reason if member else "",
        )

    def _data_port(self, device: DeviceId) -> int:
        hello, known = self.hellos.get(device), self.known.get(device)
        return hello.data_port if hello else known.data_port if known else 0
