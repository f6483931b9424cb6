"""What every link of the household costs: measures this device's own links, and hears what others measured of theirs.

The times of real traffic refine both.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peerllm.daemon.control_messages import LinkTable
from peerllm.daemon.network.speed.link_estimates import Meter
from peerllm.daemon.network.speed.link_tables import LEAST_MS, LinkFigure, LinkTables, Pair, news
from peerllm.daemon.network.speed.probe_scheduler import ProbeScheduler
from peerllm.types import DeviceId

FRESH_S = 600.0  # what is known of a link is good for so long
QUIET_S = 3.0  # after the last frame of a request: then nothing is being answered
LOOK_S = 2.0  # how often it is looked whether the others should hear something; no two tables are closer
REPEAT_S = 300.0  # a table is said again after this, changed or not
SMALL_FRAMES, LARGE_FRAMES = 8, 4  # timed of a link, beside those that warm it up
SMALL_FRAME_BYTES, LARGE_FRAME_BYTES = 2 << 10, 64 << 10  # a token's hidden state; a piece of a prompt
LEAST_FRAME_BYTES = 256
SMALL_FRAME_S, LARGE_FRAME_S = 0.02, 0.01  # a frame that would be under way longer is not sent

log = logging.getLogger(__name__)

Timed = tuple[int, float]  # bytes, seconds


@dataclass(frozen=True, slots=True)
class LinkProbes:
    """How the survey reaches other devices."""

    probe: Callable[[DeviceId], Awaitable[float]]  # Mbps from a device to this one
    rtts_ms: Callable[[], Mapping[DeviceId, float]]
    online: Callable[[], Iterable[DeviceId]]
    tell: Callable[[LinkTable], None]  # everybody


async def _no_echo(device: DeviceId, sizes: Sequence[int]) -> Sequence[Timed]:
    return ()


class LinkMonitor:
    """`echo` times frames to a device's engine, while `may_echo` says that both engines run."""

    def __init__(
        self, me: DeviceId, reach: LinkProbes, idle: Callable[[], bool], on_change: Callable[[], None]
    ) -> None:
        self.echo: Callable[[DeviceId, Sequence[int]], Awaitable[Sequence[Timed]]] = _no_echo
        self.may_echo: Callable[[DeviceId], bool] = lambda device: False
        self._tables = LinkTables(me)
        self._reach, self._idle, self._on_change = reach, idle, on_change
        self._probing = ProbeScheduler(
            self._measure, reach.online, self._due, lambda: self.quiet, 1.0 + int(me[:8], 16) / 0xFFFFFFFF
        )
        self._meters: dict[DeviceId, Meter] = {}
        self._frame_at = float("-inf")
        self._told: LinkTable | None = None
        self._told_at = float("-inf")
        self._telling: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._probing.start()
        self._telling = asyncio.create_task(self._look(), name="network-links")

    async def close(self) -> None:
        await self._probing.close()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)

    # ---- what is known ----

    def figures(self) -> dict[Pair, LinkFigure]:
        """Every ordered pair of devices of which enough was measured, by whichever end."""
        return self._tables.figures(self._reach.rtts_ms(), time.monotonic())

    def mbps(self, device: DeviceId) -> float | None:
        """From that device to this one."""
        estimate = self._tables.incoming(device)
        return None if estimate is None else estimate.mbps

    @property
    def fastest_mbps(self) -> float:
        return max((self.mbps(device) or 0.0 for device in self._reach.online()), default=0.0)

    @property
    def quiet(self) -> bool:
        """Whether nothing is going on that a measurement would disturb, or that would disturb it."""
        return self._idle() and not self._meters and time.monotonic() - self._frame_at > QUIET_S

    @property
    def may_be_probed(self) -> bool:
        """Whether another device may measure its link to here now."""
        return self.quiet and not self._probing.measuring

    # ---- what happens ----

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Exactly these other devices are of the household."""
        self._tables.keep_only(devices)
        self._probing.keep_only(devices)

    def connected(self, device: DeviceId) -> LinkTable | None:
        """A link to the device stands; what it should be told of this one's links."""
        self._probing.connected(device)
        table = self._tables.mine(self._reach.rtts_ms(), time.monotonic())
        return table if table.links else None

    def engine_changed(self) -> None:
        """An engine has started, here or elsewhere: hops may be measured now."""
        for device in self._reach.online():
            self._probing.connected(device)

    def gone(self, device: DeviceId) -> None:
        self._tables.forget(device)

    def heard(self, device: DeviceId, table: LinkTable) -> None:
        if self._tables.hear(device, table, time.monotonic()):
            self._on_change()

    def framed(self, device: DeviceId, nbytes: int, seconds: float) -> None:
        """A frame of a request took so long to that device."""
        now = self._frame_at = time.monotonic()
        if (estimate := self._tables.outgoing(device)) is not None:
            estimate.framed(nbytes, seconds, now)

    def handover(self, seconds: float | None) -> None:
        """How long an arrived frame waits until this device's compute thread has it, where that has nothing to do."""
        self._tables.handover_ms = None if seconds is None else max(seconds * 1e3, LEAST_MS)

    async def metered(self, device: DeviceId, blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The same blocks; how fast they came is noted."""
        meter = self._meters.setdefault(device, Meter())
        opened = False
        try:
            block = await anext(blocks, None)
            meter.opened(time.monotonic())
            opened = True
            while block is not None:
                yield block
                meter.waits(time.monotonic())
                block = None
                try:
                    block = await anext(blocks, None)
                finally:
                    self._carried(device, meter.came(len(block or b""), time.monotonic()))
        finally:
            if opened:
                meter.closed(time.monotonic())
            if not meter.readers and self._meters.get(device) is meter:
                del self._meters[device]

    def _carried(self, device: DeviceId, piece: tuple[int, float, float] | None) -> None:
        estimate = self._tables.incoming(device)
        if piece is not None and estimate is not None:
            estimate.carried(*piece, time.monotonic())

    # ---- measuring ----

    def _due(self, device: DeviceId) -> bool:
        return self._rate_due(device) or self._hop_due(device)

    def _rate_due(self, device: DeviceId) -> bool:
        estimate = self._tables.incoming(device)
        if estimate is None:
            return False
        return estimate.at is None or time.monotonic() - estimate.at >= FRESH_S or estimate.doubtful

    def _hop_due(self, device: DeviceId) -> bool:
        estimate = self._tables.outgoing(device)
        if estimate is None or not self.may_echo(device):
            return False
        return estimate.at is None or time.monotonic() - estimate.at >= FRESH_S

    async def _measure(self, device: DeviceId) -> None:
        if self._rate_due(device):
            mbps = await self._reach.probe(device)
            if (estimate := self._tables.incoming(device)) is not None:
                estimate.probed(mbps, time.monotonic())
        if self._hop_due(device):
            timed = await self.echo(device, frame_sizes(self.mbps(device)))
            if (estimate := self._tables.outgoing(device)) is not None:
                estimate.echoed(timed, time.monotonic())
        self._on_change()
        self._tell_news()

    # ---- telling ----

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._tell_news()

    def _tell_news(self) -> None:
        now = time.monotonic()
        table = self._tables.mine(self._reach.rtts_ms(), now)
        waited = now - self._told_at
        if (waited >= LOOK_S and news(table, self._told)) or (waited >= REPEAT_S and table.links):
            self._told, self._told_at = table, now
            self._reach.tell(table)
            self._on_change()


def frame_sizes(mbps: float | None) -> list[int]:
    """Frames to time a link with, none of them long under way; the small ones first."""
    byte_s = 8e-6 / mbps if mbps else 0.0
    small = SMALL_FRAME_BYTES if SMALL_FRAME_BYTES * byte_s <= SMALL_FRAME_S else LEAST_FRAME_BYTES
    large = LARGE_FRAME_BYTES if LARGE_FRAME_BYTES * byte_s <= LARGE_FRAME_S else 0
    return [small] * SMALL_FRAMES + [large] * (LARGE_FRAMES if large else 0)
