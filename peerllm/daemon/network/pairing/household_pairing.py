"""Pairing, from both sides: lets a new device into this household, or takes this device into another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peerllm.daemon.discovery.advert import printable_name
from peerllm.daemon.network.pairing.door_finder import DoorFinder, Place
from peerllm.daemon.network.peer import Sighting
from peerllm.daemon.settings import CONTROL_PORT, Settings
from peerllm.errors import BadInputError, PairingError
from peerllm.transport.identity import Identity
from peerllm.transport.pairing.code import door_name
from peerllm.transport.pairing.door import PairingDoor
from peerllm.transport.pairing.join import JoinResult, join
from peerllm.transport.roster.roster import Roster

PAIRING_OFFSET = 2  # the door's port, counted from the control port
JOIN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What joining brought, and where the inviter most likely listens."""

    result: JoinResult
    host: str
    control_port: int


class HouseholdPairing:
    """Opens this device's pairing door, and joins through the door of another device."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        roster: Callable[[], Roster],
        sightings: Callable[[], Iterable[Sighting]],
        on_paired: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self.finder = DoorFinder(sightings)
        self._settings = settings
        self._identity = identity
        self._name = printable_name(settings.name)
        self._roster = roster
        self._on_paired = on_paired
        self._on_change = on_change
        self._door: PairingDoor | None = None

    @property
    def name(self) -> str:
        """The open door's name, "" while it is shut."""
        return self._door.door if self._door is not None else ""

    @property
    def port(self) -> int:
        """The open door's port, 0 while it is shut."""
        return self._door.port if self._door is not None and self._door.is_open else 0

    async def open(self, control_port: int) -> tuple[str, int]:
        """A code and the port it opens. BadInputError if the port is in use."""
        await self.close()
        wanted = self._settings.pairing_port
        # Where ports are free to choose, the door still keeps its distance: the newcomer finds the control port by it.
        ports = [wanted] if wanted else [min(control_port + PAIRING_OFFSET, 65535), 0]
        while True:
            door = PairingDoor(
                self._identity,
                self._roster,
                self._name,
                self._settings.hosts,
                ports.pop(0),
                self._on_paired,
                lambda reason: self._on_change(),
            )
            try:
                code = await door.open()
            except BadInputError:
                if not ports:
                    raise
                continue
            self._door = door
            self._on_change()
            return code, door.port

    async def close(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            await door.close()

    async def join(self, code: str, at: Place | None, mdns: str) -> Joined:
        """Join at the address `at`, else through the door with that name that mDNS finds. PairingError says why not.

        `mdns`: why mDNS does not work, "" if it does.
        """
        places: list[tuple[Place, int]]
        if at is not None:
            places = [(at, at[1] - PAIRING_OFFSET if at[1] > PAIRING_OFFSET else CONTROL_PORT)]
        else:
            places = [(place, s.port) for s, place in await self.finder.doors(door_name(code), mdns)]
        failure: PairingError | None = None
        for (host, port), control_port in places:
            try:
                result = await join(
                    self._identity,
                    self._name,
                    code,
                    host,
                    port,
                    counter=self._roster().counter,
                    timeout_s=JOIN_TIMEOUT_S,
                )
            except PairingError as error:
                failure = failure or error
            else:
                return Joined(result, host, control_port)
        raise failure or PairingError("no door was found")
