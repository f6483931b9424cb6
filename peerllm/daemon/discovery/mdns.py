"""Devices find each other: mDNS/DNS-SD `_peerllm._tcp` (RFC 6762, 6763), IPv4 and IPv6, on every interface up."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from zeroconf import DNSQuestionType, ServiceListener, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from peerllm.daemon.discovery.advert import SERIAL_KEY, Advert, from_txt, serial_of, to_txt
from peerllm.daemon.discovery.interfaces import MAX_ADDRESSES, Interfaces, dialable, interfaces, rank

SERVICE = "_peerllm._tcp.local."
INTERFACE_CHECK_S = 5.0  # how often the machine's addresses are looked at
EARLY_CHECKS = 3  # checks that bind again even without a change: new IPv6 addresses are unusable at first
RETRY_MOST_S = 60.0  # where mDNS does not work at all, it is tried again at least this often
RESOLVE_TIMEOUT_MS = 3000
MAX_SIGHTINGS = 256  # devices remembered; further ones are not looked at
MAX_RESOLVING = 32
LATE_SERIALS = 1024  # an advert at most so many behind the newest came late; a restart draws its serial anew ...
LATE_S = 10.0  # ... and for so long: who forges a high one hides the device no longer than that
_INSTANCE = re.compile(r"([0-9a-f]{16})\._peerllm\._tcp\.local\.")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """A device advertises itself, for the first time or anew. IPv6 link-local addresses carry their zone."""

    advert: Advert
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """A device's advert ended or ran out."""

    short_id: str


class Discovery(ServiceListener):
    """Advertises this device and reports the others. Never fails: `problem` says why mDNS does not work, else ""."""

    def __init__(
        self, advert: Advert, on_event: Callable[[Seen | Gone], None], only: Sequence[str] | None = None
    ) -> None:
        """`only`: addresses to use instead of those of every interface that is up."""
        self.problem = ""
        self._advert = advert
        self._on_event = on_event
        self._only = tuple(only) if only is not None else None
        self._seen: dict[str, Seen] = {}
        self._serials: dict[str, tuple[int, float]] = {}  # of each one's newest advert, and when it came
        self._resolving: dict[str, asyncio.Task[None]] = {}
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._interfaces = Interfaces((), ())
        # Caches take a record they still hold in the back row for no news at all: no two adverts may be alike.
        self._serial = secrets.randbits(31)
        self._announced: tuple[Advert, tuple[str, ...]] | None = None
        self._announcing: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """This device's own addresses, as advertised."""
        return self._interfaces.addresses

    async def start(self) -> None:
        """Open the sockets and begin to advertise; a failure is left in `problem` and tried again."""
        await self._open()
        self._task = asyncio.create_task(self._watch(), name="discovery")

    def update(self, advert: Advert) -> None:
        """Advertise this from now on."""
        if advert != self._advert:
            self._advert = advert
            self._changed.set()

    async def close(self) -> None:
        """Say goodbye and close; can be called twice."""
        tasks = [task for task in (self._task, *self._resolving.values()) if task is not None]
        self._task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._shut()

    # ---- zeroconf's callbacks, on the loop ----

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self._look(zc, name)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self._look(zc, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        match = _INSTANCE.fullmatch(name)
        if match and self._seen.pop(match[1], None) is not None:
            self._serials.pop(match[1], None)
            self._on_event(Gone(match[1]))

    def _look(self, zc: Zeroconf, name: str) -> None:
        match = _INSTANCE.fullmatch(name)
        if match is None or match[1] == self._advert.short_id:
            return
        short_id = match[1]
        if short_id not in self._seen and len(self._seen) >= MAX_SIGHTINGS:
            return
        info = AsyncServiceInfo(SERVICE, name)
        if info.load_from_cache(zc):
            self._report(short_id, info)
        elif short_id not in self._resolving and len(self._resolving) < MAX_RESOLVING:
            task = asyncio.create_task(self._resolve(zc, short_id, info), name=f"discovery-resolve-{short_id}")
            self._resolving[short_id] = task
            task.add_done_callback(lambda _: self._resolving.pop(short_id, None))

    async def _resolve(self, zc: Zeroconf, short_id: str, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(zc, RESOLVE_TIMEOUT_MS, DNSQuestionType.QM):
                self._report(short_id, info)
        except (OSError, ZeroconfError) as error:
            log.debug("the advert of %s could not be resolved: %s", short_id, error)

    def _report(self, short_id: str, info: AsyncServiceInfo) -> None:
        try:
            advert, serial = from_txt(info.properties), serial_of(info.properties)
            if advert.short_id != short_id:
                raise ValueError(f"it claims the id {advert.short_id}")
            newest, came = self._serials.get(short_id, (serial, 0.0))
            if 0 < newest - serial <= LATE_SERIALS and monotonic() - came < LATE_S:
                raise ValueError("a newer one came before it")  # announcements are sent three times, answers later
        except ValueError as error:
            log.debug("the advert of %s is ignored: %s", short_id, error)
            return
        addresses = tuple(a for a in info.parsed_scoped_addresses() if dialable(a))
        seen = Seen(advert, tuple(dict.fromkeys(sorted(addresses, key=rank)))[:MAX_ADDRESSES])
        if not seen.addresses:
            return
        if serial != newest or not came:
            self._serials[short_id] = serial, monotonic()
        if self._seen.get(short_id) != seen:
            self._seen[short_id] = seen
            self._on_event(seen)

    # ---- this device's own advert ----

    async def _watch(self) -> None:
        wait, checks = INTERFACE_CHECK_S, 0
        while True:
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            checks += 1
            try:
                if self._zeroconf is None:
                    await self._open()
                else:
                    await self._refresh(self._zeroconf, bind=checks <= EARLY_CHECKS)
            except (OSError, RuntimeError, ZeroconfError) as error:
                await self._fail(error)
            wait = INTERFACE_CHECK_S if self._zeroconf is not None else min(RETRY_MOST_S, wait * 2)

    async def _open(self) -> None:
        try:
            self._interfaces = interfaces(self._only)
            zeroconf = AsyncZeroconf(interfaces=list(self._interfaces.bind))
            self._zeroconf = zeroconf
            # The name holds 64 bits of this device's key: probing for another one of that name would only cost time.
            self._announcing = asyncio.ensure_future(
                await zeroconf.async_register_service(self._info(), cooperating_responders=True)
            )
            # QM: several daemons of one machine share the port, and the kernel gives a unicast answer to just one.
            self._browser = AsyncServiceBrowser(
                zeroconf.zeroconf, SERVICE, listener=self, question_type=DNSQuestionType.QM
            )
            self.problem = ""
        except (OSError, RuntimeError, ZeroconfError) as error:
            await self._fail(error)

    async def _fail(self, error: Exception) -> None:
        problem = f"mDNS does not work here ({error}); name the other devices with --peer HOST:PORT"
        if problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem
        await self._shut()

    async def _refresh(self, zeroconf: AsyncZeroconf, bind: bool) -> None:
        now = interfaces(self._only)
        if now.bind != self._interfaces.bind or bind:
            await zeroconf.async_update_interfaces(list(now.bind))
        self._interfaces = now
        if self._announced != (self._advert, now.addresses):
            self._hush()
            self._announcing = asyncio.ensure_future(await zeroconf.async_update_service(self._info()))

    def _hush(self) -> None:
        """End the announcement under way: it would go on saying what no longer holds."""
        if self._announcing is not None:
            self._announcing.cancel()

    def _info(self) -> AsyncServiceInfo:
        advert = self._advert
        self._announced = (advert, self._interfaces.addresses)
        self._serial += 1
        return AsyncServiceInfo(
            SERVICE,
            f"{advert.short_id}.{SERVICE}",
            port=advert.port,
            properties=to_txt(advert) | {SERIAL_KEY: str(self._serial)},
            server=f"peerllm-{advert.short_id}.local.",
            parsed_addresses=[a.partition("%")[0] for a in self._interfaces.addresses],
        )

    async def _shut(self) -> None:
        zeroconf, self._zeroconf = self._zeroconf, None
        browser, self._browser = self._browser, None
        self._hush()
        try:
            if browser is not None:
                await browser.async_cancel()
            if zeroconf is not None:
                await zeroconf.async_close()
        except (OSError, ZeroconfError) as error:
            log.debug("mDNS did not close cleanly: %s", error)
