"""Finds the open pairing door that a code belongs to, and an address at which it can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from peerllm.daemon.network.peer import Sighting
from peerllm.errors import LinkError, PairingError

FIND_DOOR_S = 5.0  # how long a door with the code's name is looked for
REACH_TIMEOUT_S = 3.0  # per address
MAX_DOORS = 4  # of one name; only one of them is the right one
MAX_NAMED = 5  # devices named in the error

Place = tuple[str, int]


class DoorFinder:
    """Looks through the devices that mDNS shows; `news` must be called after each change of them."""

    def __init__(self, sightings: Callable[[], Iterable[Sighting]]) -> None:
        self._sightings = sightings
        self._news = asyncio.Event()

    def news(self) -> None:
        self._news.set()

    async def doors(self, name: str, mdns: str) -> list[tuple[Sighting, Place]]:
        """Open doors of that name and where they can be reached. PairingError, saying what was seen, if there is none.

        `mdns`: why mDNS does not work, "" if it does.
        """
        if mdns:
            raise PairingError(f"the inviting device cannot be looked for ({mdns}); give its address with --at HOST")
        reached: list[tuple[Sighting, Place]] = []
        try:
            async with asyncio.timeout(FIND_DOOR_S):
                while not reached:
                    self._news.clear()
                    for sighting in [s for s in self._sightings() if s.door == name][:MAX_DOORS]:
                        try:
                            host = await reach(sighting.addresses, sighting.pairing_port)
                        except LinkError:
                            continue
                        reached.append((sighting, (host, sighting.pairing_port)))
                    if not reached:
                        await self._news.wait()
        except TimeoutError as error:
            raise PairingError(self._nothing(name)) from error
        return reached

    def _nothing(self, name: str) -> str:
        seen = [f"{s.name} ({s.addresses[0]})" for s in self._sightings()][:MAX_NAMED]
        saw = f"saw only {', '.join(seen)}" if seen else "saw no other device"
        return (
            f"no device on this network waits for a code that begins with {name} ({saw}); check the code, or give "
            "the inviting device's address with --at HOST"
        )


async def reach(hosts: tuple[str, ...], port: int) -> str:
    """The first of the addresses that accepts a connection. LinkError if none does."""

    async def attempt(host: str) -> str:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
        writer.transport.abort()
        return host

    waiting = {asyncio.create_task(attempt(host), name=f"reach-{host}") for host in hosts}
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    return task.result()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    raise LinkError(f"nothing answers at {', '.join(hosts) or 'no address'}, port {port}")
