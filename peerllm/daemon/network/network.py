"""How one device reaches its household: members, presence, messages and questions, pairing, downloads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from aiohttp import web

from peerllm.daemon.background_tasks import BackgroundTasks
from peerllm.daemon.control_messages import (
    Answer,
    Ask,
    Control,
    DeviceView,
    Goodbye,
    Gossip,
    HeartbeatKey,
    Hello,
    LinkTable,
    Question,
    Whereabouts,
)
from peerllm.daemon.decide import membership_events as m
from peerllm.daemon.discovery.advert import SHORT_ID_DIGITS, printable_name
from peerllm.daemon.facade import RelayedAnswer
from peerllm.daemon.network.asks import Asks, Handler
from peerllm.daemon.network.control_links import ControlLinks
from peerllm.daemon.network.heartbeats.heartbeat_thread import HeartbeatThread
from peerllm.daemon.network.household_roster import HouseholdRoster
from peerllm.daemon.network.messenger import Messenger
from peerllm.daemon.network.network_callbacks import NetworkCallbacks, call
from peerllm.daemon.network.network_files import Known, NetworkFiles
from peerllm.daemon.network.pairing.household_pairing import HouseholdPairing
from peerllm.daemon.network.peer import Peer, Sighting
from peerllm.daemon.network.peer_http import ControlPort, PeerHttp
from peerllm.daemon.network.peer_store import PeerStore
from peerllm.daemon.network.speed.bandwidth_probe import BandwidthProbe, add_probe
from peerllm.daemon.network.speed.link_monitor import LinkMonitor, LinkProbes
from peerllm.daemon.network.visible_devices import VisibleDevices, own_advert
from peerllm.daemon.settings import Settings
from peerllm.errors import BadInputError, LinkError, NotFoundError, PairingError
from peerllm.transport.identity import Identity
from peerllm.transport.pairing.code import normalise
from peerllm.transport.roster.entry import RosterEntry
from peerllm.transport.tls.tls_server import TlsServer
from peerllm.types import DeviceId

MAX_CONTROL_BODY_BYTES = 1 << 10  # nothing is posted to the control port but what the API takes, by its own bound

Route = Callable[[web.Request], Any]

log = logging.getLogger(__name__)


class Network:
    """All that the rest of the daemon sees of other devices. Callbacks run on the loop; what one raises is logged."""

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        hello: Callable[[], Hello],
        *,
        interfaces: Sequence[str] | None = None,
        idle: Callable[[], bool] = lambda: True,
    ) -> None:
        """`interfaces`: this device's addresses, on which mDNS is spoken, None for all it listens on; `idle`: whether
        links may be measured again now."""
        if interfaces is None and all(ip_address(host).is_loopback for host in settings.hosts):
            interfaces = settings.hosts
        self.identity = identity
        self._settings = settings
        self._hello = hello
        self._app = web.Application(client_max_size=MAX_CONTROL_BODY_BYTES)
        self._server = TlsServer(self._app, identity, settings.hosts, settings.port)
        self._links = ControlLinks(identity, settings.peers, self)
        self._heartbeats = HeartbeatThread(identity.device, lambda device: self._links.feed(m.HeartbeatHeard(device)))
        self._asks = Asks(lambda device, message: self._links.channel(device).send(message))
        self._http = PeerHttp(identity, self._where)
        self._store = NetworkFiles(settings.data_dir)
        self._callbacks = NetworkCallbacks()
        name = printable_name(settings.name)
        self._roster = HouseholdRoster(identity, name, self._store.roster(identity, name))
        self._messenger = Messenger(self._links, self._roster, self._heartbeats)
        probe = BandwidthProbe(self._http.get)
        reach = LinkProbes(probe.measure_mbps, self._rtts_ms, self._messenger.online, self.broadcast)
        self.link_monitor = LinkMonitor(identity.device, reach, idle, self._callbacks.changed)
        self._peer_store = PeerStore(self._store.known())
        self._visible = VisibleDevices(
            settings.mdns,
            interfaces,
            lambda: own_advert(identity.device, self.hello(), self.link_monitor.fastest_mbps, self._pairing),
            self._links.feed,
            self._visible_changed,
        )
        self._callbacks.change.append(self._visible.advertise)
        self._tasks = BackgroundTasks()
        self._pairing = HouseholdPairing(
            settings,
            identity,
            lambda: self._roster.roster,
            self.sightings,
            lambda: self._tasks.start(self._apply_roster(), "network-paired"),
            self._visible.advertise,
        )
        self._applying = asyncio.Lock()
        self._trusting: frozenset[DeviceId] = frozenset()
        self._listening = False
        self._closed = False
        self._app.router.add_get("/control/{number}", self._links.accept)
        add_probe(self._app, lambda: self.link_monitor.may_be_probed)

    # ---- life ----

    def add_route(self, method: str, path: str, handler: Route) -> None:
        """Serve a path of the control port, to devices of the household only; before `start`."""
        self._app.router.add_route(method, path, handler)

    async def start(self) -> None:
        """Listen, advertise, dial. BadInputError if the port is in use."""
        await self._server.start()
        self._listening = True
        self._heartbeats.start(self._server.addresses)
        await self._links.start()
        await self._http.start()
        self.link_monitor.start()
        await self._apply_roster()
        await self._visible.start()

    async def close(self) -> None:
        """Say goodbye and close everything; can be called twice."""
        if self._closed:
            return
        self._closed = True
        await self._pairing.close()
        await self._links.close("going down")
        await self._heartbeats.close()
        await self._visible.close()
        await self._asks.close()
        await self.link_monitor.close()
        await self._tasks.close()
        await self._http.close()
        await self._server.close()
        await self._save()
        await self._store.close()

    @property
    def port(self) -> int:
        """The control port that is open."""
        return self._server.port

    @property
    def problem(self) -> str:
        """What keeps this device from finding others: why mDNS does not work, or a `--peer` that cannot be used."""
        mdns = [self._visible.problem] if self._visible.problem else []
        peers = [f"--peer {host}:{port}: {why}" for (host, port), why in self._links.problems.items()]
        return "; ".join(mdns + peers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach this device, the likeliest first; loopback where it listens nowhere else."""
        return self._visible.addresses

    # ---- who there is ----

    def peers(self) -> Mapping[DeviceId, Peer]:
        """Every other device of the household, here or away."""
        return {device: self._peer(entry) for device, entry in self._roster.others().items()}

    def name(self, device: DeviceId) -> str:
        """What people call another device; the start of its id if it is not of the household."""
        entry = self._roster.others().get(device)
        return self._peer(entry).name if entry is not None else device[:8]

    def roster(self) -> tuple[RosterEntry, ...]:
        """The household's live members, this device among them."""
        return tuple(self._roster.members().values())

    def sightings(self) -> tuple[Sighting, ...]:
        """Devices heard of by mDNS that are not of the household."""
        return self._visible.strangers({device[:SHORT_ID_DIGITS] for device in self._roster.members()})

    def _peer(self, entry: RosterEntry) -> Peer:
        member, channel = self._links.membership.members.get(entry.device), self._links.find(entry.device)
        rtt_ms = channel.rtt_ms if channel else None
        return self._peer_store.peer(entry, member, rtt_ms, self.link_monitor.mbps(entry.device))

    def _rtts_ms(self) -> dict[DeviceId, float]:
        channels = ((device, self._links.find(device)) for device in self._messenger.online())
        return {device: one.rtt_ms for device, one in channels if one is not None and one.rtt_ms is not None}

    # ---- talking ----

    async def ask(self, device: DeviceId, question: Question, timeout_s: float) -> Answer:
        """The answer. Raises the error it names (with its `free_bytes`), LinkError if the device is or goes away."""
        return await self._asks.ask(device, question, timeout_s)

    def answer_with(self, handler: Handler) -> None:
        """Answer questions with `handler`; an exception of it becomes an answer that names it."""
        self._asks.answer_with(handler)

    def kept_busy(self, device: DeviceId, seconds: float) -> None:
        """Answering a device took a processor so long, off the loop: it counts as what it sends does."""
        self._links.spend(device, seconds)

    def tell(self, device: DeviceId, message: Control) -> None:
        """Send a message and forget it; a device that is away misses it."""
        self._messenger.tell(device, message)

    def broadcast(self, message: Control) -> None:
        """Tell every device that is here. The last DeviceView is also told to those that come later."""
        self._messenger.broadcast(message)

    async def say_goodbye(self, reason: str) -> None:
        """End all links for now, so that nobody waits for this device; they come back by themselves."""
        await self._links.last_words(self._messenger.online(), Goodbye(reason), reason)

    def set_hello_changed(self) -> None:
        """What this device says of itself has changed: say it again, to the household and by mDNS."""
        if self._listening:
            self.broadcast(self.hello())
            self._visible.advertise()

    def listen(self, callback: Callable[[DeviceId, Control], None]) -> None:
        """Hear what other devices tell."""
        self._callbacks.message.append(callback)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Called after peers, their views or the roster changed; several changes at once count as one."""
        self._callbacks.change.append(callback)

    def on_state(self, callback: Callable[[DeviceId, m.State, m.State, str, bool], None]) -> None:
        """Called with each change of a device's state: device, state before, state, reason, and whether it is reached
        over another connection than before, so that what was under way may be lost."""
        self._callbacks.state.append(callback)

    def on_roster(self, callback: Callable[[tuple[RosterEntry, ...]], None]) -> None:
        """Called at start and after each change of the household with its live members, this device among them."""
        self._callbacks.roster.append(callback)

    async def get(self, device: DeviceId, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Exactly `length` bytes of a path on the device from `offset` on. LinkError if it breaks, NotFoundError."""
        async with (
            aclosing(self._http.get(device, path, offset, length)) as blocks,
            aclosing(self.link_monitor.metered(device, blocks)) as metered,
        ):
            async for chunk in metered:
                yield chunk

    def post(
        self, device: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AbstractAsyncContextManager[RelayedAnswer]:
        """What the device answers to a POST at its control port. LinkError if it is away or the link breaks."""
        return self._http.post(device, path, headers, body)

    def _where(self, device: DeviceId) -> ControlPort:
        channel = self._links.channel(device)
        member, entry = self._links.membership.members.get(device), self._roster.others().get(device)
        if member is None or entry is None:
            raise LinkError(f"{device[:8]} is no longer of the household")
        return ControlPort(channel.host, member.port, entry.certificate_pem)

    # ---- pairing ----

    async def open_door(self) -> tuple[str, int]:
        """Open the pairing door; returns the code and the port. BadInputError if the port is in use."""
        return await self._pairing.open(self.port)

    async def join(self, code: str, at: tuple[str, int] | None) -> str:
        """Join the household whose door the code opens; returns the inviter's name. PairingError says why not."""
        code = normalise(code)
        if others := self._roster.others():
            name = next(iter(others.values())).name
            raise PairingError(f"this device is in a household with {name} already; run `peerllm leave` first")
        joined = await self._pairing.join(code, at, self._visible.blind)
        inviter = joined.result.device
        self._roster.roster.merge(joined.result.entries)
        self._peer_store.known[inviter] = Known(inviter, joined.result.name, (joined.host,), joined.control_port, 0)
        await self._apply_roster()
        return joined.result.name

    async def leave(self) -> None:
        """Leave the household; the others are told. BadInputError if this device is in none."""
        if not self._roster.others():
            raise BadInputError("this device is in no household")
        self._roster.remove(self.identity.device)
        await self._links.last_words(self._messenger.online(), self._roster.gossip(), "left the household")
        await self._start_anew()

    async def remove(self, device: DeviceId) -> None:
        """Put a device out of the household. NotFoundError if it is not in it."""
        if device == self.identity.device:
            return await self.leave()
        if device not in self._roster.others():
            raise NotFoundError(f"no device {device[:8]} belongs to this household")
        self._roster.remove(device)
        await self._links.last_words((device,), self._roster.gossip(), "removed from the household")
        await self._apply_roster()

    # ---- the roster ----

    async def _start_anew(self) -> None:
        async with self._applying:
            self._roster.start_anew()
        await self._apply_roster()

    async def _apply_roster(self) -> None:
        """Bring everything in line with the roster: trust, links, memory of others, disk, callbacks, the others."""
        async with self._applying:
            others = self._roster.others()
            changed, self._trusting = self._trusting != others.keys(), frozenset(others)
            self._peer_store.keep_only(others)
            self.link_monitor.keep_only(others)
            self._heartbeats.keep_only(others)
            self._links.feed(m.Members(frozenset(others)))
            if changed or not others:
                call(self._callbacks.roster, self.roster())  # first of all: engines cut the links of who was removed
            await self._server.set_trusted(entry.certificate_pem for entry in others.values())
            self._recall(others)
            self.broadcast(self._roster.gossip())
            self._callbacks.changed()
        await self._save()

    def _recall(self, devices: Iterable[DeviceId]) -> None:
        """Tell membership where devices were last and where they are seen now."""
        for device in devices:
            for sighted in (self._peer_store.sighted(device), self._visible.sighted(device[:SHORT_ID_DIGITS])):
                if sighted is not None:
                    self._links.feed(sighted)

    def _gossip(self, device: DeviceId, gossip: Gossip) -> None:
        match self._roster.hear(device, gossip):
            case "removed":
                self._tasks.start(self._start_anew(), "network-start-anew")
            case "changed":
                self._tasks.start(self._apply_roster(), "network-apply-roster")
            case "same":
                pass

    async def _save(self) -> None:
        await self._store.save_roster(self._roster.roster)
        await self._store.save_known(self._peer_store.where(self._links.membership.members, self._roster.members()))

    # ---- what the links and mDNS report ----

    def hello(self) -> Hello:
        """What this device says of itself."""
        return replace(self._hello(), control_port=self.port)

    def certificates(self) -> Mapping[DeviceId, str]:
        return {device: entry.certificate_pem for device, entry in self._roster.others().items()}

    def on_hello(self, device: DeviceId, hello: Hello) -> None:
        self._peer_store.hellos[device] = hello

    def on_up(self, device: DeviceId, address: str) -> None:
        self._heartbeats.set_address(device, address, self._links.membership.members[device].port)
        self._greet(device)
        self._tasks.start(self._save(), "network-save-peers")

    def _greet(self, device: DeviceId) -> None:
        self._messenger.greet(device)
        if (table := self.link_monitor.connected(device)) is not None:
            self.tell(device, table)

    def on_member(self, change: m.Changed) -> None:
        device, before, state, reason = change.device, change.before, change.state, change.reason
        if before in m.LINKED:
            log.info("%s is %s: %s", device[:8], state, reason or ("reached anew" if change.renewed else "heard again"))
            if change.renewed:
                self._asks.vanished(device, "the connection was made anew")
            elif state not in m.LINKED:
                self._peer_store.views.pop(device, None)
                self.link_monitor.gone(device)
                self._asks.vanished(device, reason)
            elif before == "silent":
                self._greet(device)
        if before != state or change.renewed:
            call(self._callbacks.state, device, before, state, reason, change.renewed)
        self._callbacks.changed()

    def on_message(self, device: DeviceId, message: Control) -> None:
        match message:
            case Gossip():
                self._gossip(device, message)
            case HeartbeatKey():
                self._heartbeats.set_key(device, message.half)
            case Whereabouts():
                for hint in self._peer_store.hinted(message, self._roster.others()):
                    self._links.feed(hint)
            case Ask():
                self._asks.asked(device, message)
            case Answer():
                self._asks.answered(device, message)
            case LinkTable():
                self.link_monitor.heard(device, message)
            case Hello():
                self._peer_store.hellos[device] = message
                self._callbacks.changed()
            case _:
                if isinstance(message, DeviceView):
                    self._peer_store.views[device] = message
                    self._callbacks.changed()
                call(self._callbacks.message, device, message)

    def _visible_changed(self) -> None:
        self._pairing.finder.news()
        self._callbacks.changed()
