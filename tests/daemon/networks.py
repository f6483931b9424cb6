"""Networks for tests: several in one process on loopback, paired for real; and one as a program of its own."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from peerllm.daemon.control_messages import Hello
from peerllm.daemon.decide.membership_events import LINKED, State
from peerllm.daemon.network import Network
from peerllm.daemon.settings import Settings
from peerllm.transport.identity import load_or_create

PROTOCOL = 1
WAIT_S = 15.0  # a busy machine


class Device:
    """One Network with what it was told, waited for without sleeping."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        mdns: bool = False,
        port: int = 0,
        peers: tuple[tuple[str, int], ...] = (),
        protocol: int = PROTOCOL,
        everywhere: bool = False,
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.protocol = protocol
        hosts = ("0.0.0.0", "::") if everywhere else ("127.0.0.1",)
        settings = Settings(self.directory, name, port=port, peers=peers, hosts=hosts, mdns=mdns)
        identity = load_or_create(self.directory)
        only = None if everywhere else ("127.0.0.1",)
        self.network = Network(settings, identity, self.hello, interfaces=only)
        self.id = identity.device
        self.vanished: list[tuple[str, str]] = []
        self.states: list[tuple[str, str, bool]] = []
        self.told: list[tuple[str, object]] = []
        self.changed = asyncio.Event()
        self.network.on_change(self.changed.set)
        self.network.on_state(self._state)
        self.network.listen(self._hear)

    def _state(self, device: str, before: State, state: State, reason: str, renewed: bool) -> None:
        self.states.append((device, state, renewed))
        if before in LINKED and state not in LINKED:
            self.vanished.append((device, reason))

    def _hear(self, device: str, message: object) -> None:
        self.told.append((device, message))
        self.changed.set()

    def hello(self) -> Hello:
        return Hello(
            self.protocol,
            "0",
            {"torch": "2"},
            self.name,
            0,
            4711,
            8 << 30,
            4 << 30,
            {"float32": 12.5},
            {"float32": 85.0},
            ("llama",),
            ("float32",),
        )

    async def until(self, condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
        """Wait until the condition holds; looked at after each change."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), 0.05)

    def state(self, other: Device | str) -> str:
        peer = self.network.peers().get(other if isinstance(other, str) else other.id)
        return peer.state if peer else "stranger"

    async def sees(self, *others: Device) -> None:
        """Wait until all of these are online."""
        await self.until(lambda: all(self.state(other) == "online" for other in others))


async def pair(inviter: Device, joiner: Device) -> None:
    """One code; afterwards both are online to each other."""
    code, port = await inviter.network.open_door()
    assert await joiner.network.join(code, ("127.0.0.1", port)) == inviter.name
    await inviter.sees(joiner)
    await joiner.sees(inviter)


@asynccontextmanager
async def devices(directory: Path, *names: str, mdns: bool = False) -> AsyncIterator[list[Device]]:
    """Started devices that do not know each other yet."""
    made = [Device(directory, name, mdns=mdns) for name in names]
    try:
        for device in made:
            await device.network.start()
        yield made
    finally:
        for device in made:
            await device.network.close()


async def main(directory: str, name: str, options: list[str]) -> None:
    """Run one Network until SIGTERM, saying what happens on stdout; commands come on stdin."""
    peers = tuple((o.rsplit(":", 1)[0], int(o.rsplit(":", 1)[1])) for o in options if ":" in o)
    device = Device(Path(directory), name, mdns="mdns" in options, peers=peers, everywhere="everywhere" in options)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    seen: set[object] = set()
    online: set[str] = set()

    def report() -> None:
        for sighting in device.network.sightings():
            if sighting not in seen:
                seen.add(sighting)
                print("seen", sighting.name, *sighting.addresses, flush=True)
        for peer in device.network.peers().values():
            if (peer.state == "online") != (peer.name in online):
                online.symmetric_difference_update({peer.name})
                print("online" if peer.name in online else "gone", peer.name, flush=True)

    device.network.on_change(report)
    await device.network.start()
    print("port", device.network.port, flush=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def obey() -> None:
        while line := (await reader.readline()).decode().split():
            if line[0] == "invite":
                print("code", *await device.network.open_door(), flush=True)
            elif line[0] == "busy":  # the loop stands, threads do not
                end = time.monotonic() + float(line[1])
                while time.monotonic() < end:
                    pass
                print("free", flush=True)
            elif line[0] == "join":
                at = (line[2], int(line[3])) if len(line) > 2 else None
                print("joined", await device.network.join(line[1], at), flush=True)
        ended.set()

    obeying = asyncio.create_task(obey(), name="commands")
    await ended.wait()
    obeying.cancel()
    await device.network.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
