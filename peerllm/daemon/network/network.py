"""The household as one device reaches it: who is of it, who is here, questions, told messages, pairing, bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aiohttp import web

from peerllm.daemon import membership as m
from peerllm.daemon.advert import SHORT_ID_DIGITS, Advert, printable_name
from peerllm.daemon.discovery import Discovery, Gone, Seen
from peerllm.daemon.messages import Answer, Ask, Control, DeviceView, Gossip, Hello, Question
from peerllm.daemon.network.asks import Asks, Handler
from peerllm.daemon.network.bandwidth import Bandwidth
from peerllm.daemon.network.bulk import Bulk, add_probe
from peerllm.daemon.network.knocking import Knocking
from peerllm.daemon.network.links import Links
from peerllm.daemon.network.peer import Peer, Sighting
from peerllm.daemon.network.store import Known, Store
from peerllm.daemon.settings import CONTROL_PORT, Settings
from peerllm.errors import BadInputError, LinkError, NotFoundError, PairingError
from peerllm.transport.identity import Identity
from peerllm.transport.pairing import PairingDoor, door_name, normalise
from peerllm.transport.pairing import join as knock
from peerllm.transport.roster import RosterEntry
from peerllm.transport.tls import TlsServer
from peerllm.types import DeviceId

PAIRING_OFFSET = 2  # the door's port, counted from the control port
FLUSH_S = 0.5  # how long a last word to a device may take
JOIN_TIMEOUT_S = 30.0
MAX_CONTROL_BODY_BYTES = 1 << 10  # nothing is posted to the control port

Route = Callable[[web.Request], Any]

log = logging.getLogger(__name__)


class Network:
    """Everything by which this device knows the others. Callbacks run on the loop; what one raises is logged."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        hello: Callable[[], Hello],
        *,
        interfaces: Sequence[str] | None = None,
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """`interfaces`: addresses mDNS is spoken on, None for all; `idle`: whether links may be measured again now."""
        self.identity = identity
        self._settings = settings
        self._hello = hello
        self._interfaces = interfaces
        self._app = web.Application(client_max_size=MAX_CONTROL_BODY_BYTES)
        self._server = TlsServer(self._app, identity, settings.hosts, settings.port)
        self._links = Links(identity, settings.peers, self)
        self._asks = Asks(lambda device, message: self._links.channel(device).send(message))
        self._bulk = Bulk(identity)
        self._store = Store(settings.data_dir)
        self._bandwidth = Bandwidth(self._measure, self._online, idle, self._news)
        self._roster = self._store.roster(identity, printable_name(settings.name))
        self._known: dict[DeviceId, Known] = {known.device: known for known in self._store.known()}
        self._hellos: dict[DeviceId, Hello] = {}
        self._views: dict[DeviceId, DeviceView] = {}
        self._view: DeviceView | None = None
        self._seen: dict[str, Seen] = {}
        self._knocking = Knocking(self.sightings)
        self._discovery: Discovery | None = None
        self._door: PairingDoor | None = None
        self._applying = asyncio.Lock()
        self._trusting: frozenset[DeviceId] = frozenset()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[DeviceId, Control], None]] = []
        self._on_change: list[Callable[[], None]] = []
        self._on_vanish: list[Callable[[DeviceId, str], None]] = []
        self._on_roster: list[Callable[[tuple[RosterEntry, ...]], None]] = []
        self._news_due = False
        self._closed = False
        self._app.router.add_get("/control/{number}", self._links.accept)
        add_probe(self._app)

    # ---- life ----

    def add_route(self, method: str, path: str, handler: Route) -> None:
        """Serve a path of the control port, to devices of the household only; before `start`."""
        self._app.router.add_route(method, path, handler)

    async def start(self) -> None:
        """Listen, advertise, dial. BadInputError if the port is in use."""
        await self._server.start()
        await self._links.start()
        await self._bulk.start()
        self._bandwidth.start()
        await self._apply_roster()
        if self._settings.mdns:
            self._discovery = Discovery(self._advert(), self._sighted, self._interfaces)
            await self._discovery.start()

    async def close(self) -> None:
        """Say goodbye and close everything; can be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._door is not None:
            await self._door.close()
        await self._links.close("going down")
        if self._discovery is not None:
            await self._discovery.close()
        await self._asks.close()
        await self._bandwidth.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bulk.close()
        await self._server.close()
        await self._save()

    @property
    def port(self) -> int:
        """The control port that is open."""
        return self._server.port

    @property
    def problem(self) -> str:
        """What keeps this device from finding others: why mDNS does not work, or a `--peer` that cannot be used."""
        mdns = [self._discovery.problem] if self._discovery is not None and self._discovery.problem else []
        peers = [f"--peer {host}:{port}: {why}" for (host, port), why in self._links.problems.items()]
        return "; ".join(mdns + peers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """This device's own addresses, as far as they are known."""
        return self._discovery.addresses if self._discovery is not None else ()

    # ---- who there is ----

    def peers(self) -> Mapping[DeviceId, Peer]:
        """Every other device of the household, here or away."""
        return {device: self._peer(device, entry) for device, entry in self._others().items()}

    def roster(self) -> tuple[RosterEntry, ...]:
        """The household's live members, this device among them."""
        return tuple(self._roster.members().values())

    def sightings(self) -> tuple[Sighting, ...]:
        """Devices heard of by mDNS that are not of the household."""
        members = {device[:SHORT_ID_DIGITS] for device in self._roster.members()}
        return tuple(
            Sighting(a.short_id, a.name, seen.addresses, a.port, a.protocol, a.memory_bytes, a.door, a.pairing_port)
            for short_id, seen in self._seen.items()
            if short_id not in members and (a := seen.advert)
        )

    def _others(self) -> dict[DeviceId, RosterEntry]:
        return {device: e for device, e in self._roster.members().items() if device != self.identity.device}

    def _online(self) -> Iterable[DeviceId]:
        return [device for device, one in self._links.membership.members.items() if one.state == "online"]

    def _peer(self, device: DeviceId, entry: RosterEntry) -> Peer:
        member = self._links.membership.members.get(device)
        hello, known, channel = self._hellos.get(device), self._known.get(device), self._links.find(device)
        return Peer(
            device=device,
            name=hello.name if hello else entry.name,
            state=member.state if member else "offline",
            hello=hello,
            view=self._views.get(device),
            hosts=member.hosts if member else (),
            control_port=member.port if member else 0,
            data_port=hello.data_port if hello else known.data_port if known else 0,
            rtt_ms=channel.rtt_ms if channel else None,
            mbps=self._bandwidth.mbps.get(device),
            problem=member.reason if member else "",
        )

    # ---- talking ----

    async def ask(self, device: DeviceId, question: Question, timeout_s: float) -> Answer:
        """The device's answer. Raises the error it names (with its `free_bytes`), LinkError if it is away or vanishes."""
        return await self._asks.ask(device, question, timeout_s)

    def answer_with(self, handler: Handler) -> None:
        """Answer questions with `handler`; an exception of it becomes an answer that names it."""
        self._asks.answer_with(handler)

    def tell(self, device: DeviceId, message: Control) -> None:
        """Send a message and forget it; a device that is away misses it."""
        try:
            self._links.channel(device).send(message)
        except LinkError as error:
            log.debug("a %s was not told: %s", type(message).__name__, error)

    def broadcast(self, message: Control) -> None:
        """Tell every device that is here. The last DeviceView is also told to those that come later."""
        if isinstance(message, DeviceView):
            self._view = message
        for device in self._online():
            self.tell(device, message)

    def set_hello_changed(self) -> None:
        """What this device says of itself has changed: say it again, to the household and by mDNS."""
        self.broadcast(self.hello())
        self._advertise()

    def listen(self, callback: Callable[[DeviceId, Control], None]) -> None:
        """Hear what other devices tell."""
        self._listeners.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called after peers, their views or the roster changed; several changes at once count as one."""
        self._on_change.append(callback)

    def on_vanish(self, callback: Callable[[DeviceId, str], None]) -> None:
        """Called when a device that was online is not any more, with the reason."""
        self._on_vanish.append(callback)

    def on_roster(self, callback: Callable[[tuple[RosterEntry, ...]], None]) -> None:
        """Called at start and after each change of the household with its live members, this device among them."""
        self._on_roster.append(callback)

    async def get(self, device: DeviceId, path: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """Exactly `length` bytes of a path on the device from `offset` on. LinkError if it breaks, NotFoundError."""
        host, port, pem = self._where(device)
        async for chunk in self._bulk.get(device, pem, host, port, path, offset, length):
            yield chunk

    def _where(self, device: DeviceId) -> tuple[str, int, str]:
        channel = self._links.channel(device)
        member, entry = self._links.membership.members[device], self._others()[device]
        return channel.host, member.port, entry.certificate_pem

    async def _measure(self, device: DeviceId) -> float:
        host, port, pem = self._where(device)
        return await self._bulk.measure_mbps(device, pem, host, port)

    # ---- pairing ----

    async def open_door(self) -> tuple[str, int]:
        """Open the pairing door; returns the code and the port. BadInputError if the port is in use."""
        if self._door is not None:
            await self._door.close()
        wanted = self._settings.pairing_port
        # Where ports are free to choose, the door still keeps its distance: the newcomer finds the control port by it.
        for port in (wanted,) if wanted else (self.port + PAIRING_OFFSET, 0):
            door = PairingDoor(
                self.identity,
                lambda: self._roster,
                printable_name(self._settings.name),
                self._settings.hosts,
                port,
                lambda paired: self._spawn(self._apply_roster(), f"paired-{paired.device[:8]}"),
                lambda reason: self._advertise(),
            )
            try:
                code = await door.open()
            except BadInputError:
                if wanted or not port:
                    raise
                continue
            self._door = door
            break
        self._advertise()
        return code, door.port

    async def join(self, code: str, at: tuple[str, int] | None) -> str:
        """Join the household whose door the code opens; returns the inviter's name. PairingError says why not."""
        code = normalise(code)
        if others := self._others():
            name = next(iter(others.values())).name
            raise PairingError(f"this device is in a household with {name} already; run `peerllm leave` first")
        places: list[tuple[tuple[str, int], int]] = [(at, 0)] if at is not None else []
        if at is None:
            mdns = "mDNS is off" if self._discovery is None else self._discovery.problem
            places = [(place, s.port) for s, place in await self._knocking.doors(door_name(code), mdns)]
        failure: PairingError | None = None
        for place, control_port in places:
            try:
                name = printable_name(self._settings.name)
                joined = await knock(
                    self.identity, name, code, *place, counter=self._roster.counter, timeout_s=JOIN_TIMEOUT_S
                )
            except PairingError as error:
                failure = failure or error
                continue
            self._roster.merge(joined.entries)
            port = control_port or (place[1] - PAIRING_OFFSET if place[1] > PAIRING_OFFSET else CONTROL_PORT)
            self._known[joined.device] = Known(joined.device, joined.name, (place[0],), port, 0)
            await self._apply_roster()
            return joined.name
        raise failure or PairingError("no door was found")

    async def leave(self) -> None:
        """Leave the household; the others are told. BadInputError if this device is in none."""
        if not self._others():
            raise BadInputError("this device is in no household")
        self._roster.remove(self.identity, self.identity.device)
        await self._last_words(self._online(), "left the household")
        await self._start_anew()

    async def remove(self, device: DeviceId) -> None:
        """Put a device out of the household. NotFoundError if it is not in it."""
        if device == self.identity.device:
            return await self.leave()
        if device not in self._others():
            raise NotFoundError(f"no device {device[:8]} belongs to this household")
        self._roster.remove(self.identity, device)
        if device in self._online():
            await self._last_words((device,), "removed from the household")
        await self._apply_roster()

    async def _last_words(self, devices: Iterable[DeviceId], reason: str) -> None:
        """Tell the devices the roster on links that end with it, and wait a bounded moment for it to be sent."""
        channels = [channel for device in devices if (channel := self._links.find(device)) is not None]
        for channel in channels:
            channel.send(Gossip(self._roster.export()))
            channel.finish(reason)
        if channels:
            await asyncio.wait([channel.ended for channel in channels], timeout=FLUSH_S)

    # ---- the roster ----

    async def _start_anew(self) -> None:
        async with self._applying:
            self._roster = type(self._roster).create(self.identity, printable_name(self._settings.name))
        await self._apply_roster()

    async def _apply_roster(self) -> None:
        """Bring everything in line with the roster: trust, links, memory of others, disk, callbacks, the others."""
        async with self._applying:
            others = self._others()
            changed, self._trusting = self._trusting != others.keys(), frozenset(others)
            for table in (self._known, self._hellos, self._views, self._bandwidth.mbps):
                for device in [device for device in table if device not in others]:
                    del table[device]
            await self._server.set_trusted(entry.certificate_pem for entry in others.values())
            self._links.feed(m.Members(frozenset(others)))
            self._recall(others)
            self.broadcast(Gossip(self._roster.export()))
            if changed or not others:
                self._call(self._on_roster, self.roster())
            self._news()
        await self._save()

    def _recall(self, devices: Iterable[DeviceId]) -> None:
        """Tell membership where devices were last and where they are seen now."""
        for device in devices:
            prefix = device[:SHORT_ID_DIGITS]
            if (known := self._known.get(device)) is not None:
                self._links.feed(m.Sighted(prefix, known.hosts, known.control_port))
            if (seen := self._seen.get(prefix)) is not None:
                self._links.feed(m.Sighted(prefix, seen.addresses, seen.advert.port))

    def _gossip(self, device: DeviceId, gossip: Gossip) -> None:
        before = self._roster.export()
        try:
            change = self._roster.merge(gossip.entries)
        except BadInputError as error:
            log.warning("the roster of %s is not taken: %s", device[:8], error)
            return
        for reason in change.refused:
            log.info("of the roster of %s: %s", device[:8], reason)
        if not self._roster.is_member(self.identity.device):
            log.warning("this device was removed from the household")
            self._spawn(self._start_anew(), "start-anew")
        elif self._roster.export() != before:
            self._spawn(self._apply_roster(), "apply-roster")

    async def _save(self) -> None:
        for device, member in self._links.membership.members.items():
            if member.hosts and (entry := self._roster.members().get(device)) is not None:
                hello, known = self._hellos.get(device), self._known.get(device)
                data_port = hello.data_port if hello else known.data_port if known else 0
                self._known[device] = Known(device, entry.name, member.hosts, member.port, data_port)
        await self._store.save_roster(self._roster)
        await self._store.save_known(tuple(self._known[device] for device in sorted(self._known)))

    # ---- what the links and mDNS report ----

    def hello(self) -> Hello:
        """What this device says of itself."""
        return replace(self._hello(), control_port=self.port)

    def certificates(self) -> Mapping[DeviceId, str]:
        return {device: entry.certificate_pem for device, entry in self._others().items()}

    def on_hello(self, device: DeviceId, hello: Hello, host: str) -> None:
        self._hellos[device] = hello

    def on_up(self, device: DeviceId) -> None:
        self.tell(device, Gossip(self._roster.export()))
        if self._view is not None:
            self.tell(device, self._view)
        self._bandwidth.connected(device)
        self._spawn(self._save(), "save-peers")

    def on_state(self, change: m.Changed) -> None:
        if change.before == "online":
            log.info("%s is %s: %s", change.device[:8], change.state, change.reason)
            self._views.pop(change.device, None)
            self._asks.vanished(change.device, change.reason)
            self._call(self._on_vanish, change.device, change.reason)
        self._news()

    def on_message(self, device: DeviceId, message: Control) -> None:
        match message:
            case Gossip():
                self._gossip(device, message)
            case Ask():
                self._asks.asked(device, message)
            case Answer():
                self._asks.answered(device, message)
            case Hello():
                self._hellos[device] = message
                self._news()
            case _:
                if isinstance(message, DeviceView):
                    self._views[device] = message
                    self._news()
                self._call(self._listeners, device, message)

    def _sighted(self, event: Seen | Gone) -> None:
        if isinstance(event, Gone):
            self._seen.pop(event.short_id, None)
        else:
            self._seen[event.advert.short_id] = event
            self._links.feed(m.Sighted(event.advert.short_id, event.addresses, event.advert.port))
        self._knocking.news()
        self._news()

    def _advert(self) -> Advert:
        hello, door = self.hello(), self._door
        open_door = door is not None and door.is_open
        return Advert(
            short_id=self.identity.device[:SHORT_ID_DIGITS],
            name=printable_name(hello.name),
            protocol=hello.protocol,
            port=self.port,
            memory_bytes=hello.memory_bytes,
            gbytes_per_s=max(hello.gbytes_per_s.values(), default=0.0),
            gflops=max(hello.gflops.values(), default=0.0),
            mbps=max(self._bandwidth.mbps.values(), default=0.0),
            door=door.door if door is not None and open_door else "",
            pairing_port=door.port if door is not None and open_door else 0,
        )

    def _advertise(self) -> None:
        if self._discovery is not None and not self._closed:
            self._discovery.update(self._advert())

    # ---- callbacks ----

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"network-{name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    def _news(self) -> None:
        if not self._news_due and not self._closed:
            self._news_due = True
            asyncio.get_running_loop().call_soon(self._tell_news)

    def _tell_news(self) -> None:
        self._news_due = False
        self._advertise()
        self._call(self._on_change)

    @staticmethod
    def _call(callbacks: Sequence[Callable[..., None]], *arguments: object) -> None:
        for callback in callbacks:
            try:
                callback(*arguments)
            except Exception:
                log.exception("a callback failed")
