"""The devices that mDNS shows at the moment, and this device's own advert."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from peerllm.daemon.control_messages import Hello
from peerllm.daemon.decide.membership_events import Sighted
from peerllm.daemon.discovery.advert import SHORT_ID_DIGITS, Advert, printable_name
from peerllm.daemon.discovery.interfaces import interfaces
from peerllm.daemon.discovery.mdns import Discovery, Gone, Seen
from peerllm.daemon.network.peer import Sighting
from peerllm.types import DeviceId


class OpenDoor(Protocol):
    """This device's pairing door; "" and 0 while it is shut."""

    @property
    def name(self) -> str: ...
    @property
    def port(self) -> int: ...


def own_advert(device: DeviceId, hello: Hello, mbps: float, door: OpenDoor) -> Advert:
    """What this device advertises; `mbps`: of its fastest link."""
    return Advert(
        short_id=device[:SHORT_ID_DIGITS],
        name=printable_name(hello.name),
        protocol=hello.protocol,
        port=hello.control_port,
        memory_bytes=hello.memory_bytes,
        gbytes_per_s=max(hello.gbytes_per_s.values(), default=0.0),
        gflops=max(hello.gflops.values(), default=0.0),
        mbps=mbps,
        door=door.name,
        pairing_port=door.port,
    )


class VisibleDevices:
    """Remembers every device whose advert is valid; empty where mDNS is off (`on` false)."""

    def __init__(
        self,
        on: bool,
        interfaces: Sequence[str] | None,
        advert: Callable[[], Advert],
        on_sighted: Callable[[Sighted], None],
        on_change: Callable[[], None],
    ) -> None:
        self._on = on
        self._interfaces = interfaces
        self._advert = advert
        self._on_sighted = on_sighted
        self._on_change = on_change
        self._discovery: Discovery | None = None
        self._seen: dict[str, Seen] = {}

    async def start(self) -> None:
        if self._on:
            self._discovery = Discovery(self._advert(), self._event, self._interfaces)
            await self._discovery.start()

    async def close(self) -> None:
        discovery, self._discovery = self._discovery, None
        if discovery is not None:
            await discovery.close()

    def advertise(self) -> None:
        """This device's advert may have changed."""
        if self._discovery is not None:
            self._discovery.update(self._advert())

    @property
    def problem(self) -> str:
        """Why mDNS does not work, "" if it does or is not wanted."""
        return self._discovery.problem if self._discovery is not None else ""

    @property
    def blind(self) -> str:
        """Why no device can be found by mDNS, "" if they can."""
        return self.problem if self._on else "mDNS is off"

    @property
    def addresses(self) -> tuple[str, ...]:
        """This device's own addresses, the likeliest to be reached first."""
        if self._discovery is not None:
            return self._discovery.addresses
        try:
            return interfaces(self._interfaces).addresses
        except OSError:
            return ()

    def sighted(self, short_id: str) -> Sighted | None:
        """Where the device is seen now."""
        seen = self._seen.get(short_id)
        return Sighted(short_id, seen.addresses, seen.advert.port) if seen is not None else None

    def strangers(self, members: Collection[str]) -> tuple[Sighting, ...]:
        """Devices seen but for `members` (truncated ids)."""
        return tuple(
            Sighting(a.short_id, a.name, seen.addresses, a.port, a.protocol, a.memory_bytes, a.door, a.pairing_port)
            for seen in self._seen.values()
            if (a := seen.advert).short_id not in members
        )

    def _event(self, event: Seen | Gone) -> None:
        if isinstance(event, Gone):
            self._seen.pop(event.short_id, None)
        else:
            self._seen[event.advert.short_id] = event
            self._on_sighted(Sighted(event.advert.short_id, event.addresses, event.advert.port))
        self._on_change()
