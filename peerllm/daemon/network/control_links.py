"""The control links of one device. Membership decides; this dials, accepts, sends heartbeats and closes links."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from peerllm.daemon.control_messages import Control, DeviceView, Goodbye, Hello, LinkTable
from peerllm.daemon.decide import membership_events as m
from peerllm.daemon.decide.membership import Membership
from peerllm.daemon.network.control_channel import (
    CLOSE_TIMEOUT_S,
    FRAME_BYTES,
    ControlChannel,
    ProtocolMismatch,
    ReadingShares,
    WebSocket,
)
from peerllm.daemon.network.happy_eyeballs import dial_first, who_answers
from peerllm.errors import AuthenticationError, LinkError
from peerllm.request_ids import caused_by
from peerllm.transport.dial import dialling_session
from peerllm.transport.identity import Identity
from peerllm.transport.tls.contexts import peer_device
from peerllm.types import DeviceId

DRAIN_S = 1.0  # a duplicate link is read this long after its better was found
MAX_LINKS_PER_DEVICE = 4
MAX_LINKS = 512
FLUSH_S = 0.5  # how long a last word to a device may take
FAREWELL_S = 1.0  # how long goodbyes may take

log = logging.getLogger(__name__)


def host_of(peername: tuple[Any, ...] | None) -> str:
    """The address of a socket's other end as it can be dialled: a link-local IPv6 one with its interface."""
    if not peername:
        return ""
    scope = peername[3] if len(peername) == 4 else 0
    return f"{peername[0]}%{scope}" if scope else str(peername[0])


class LinkListener(Protocol):
    """What the links need of their owner, and what they tell it."""

    def hello(self) -> Hello: ...
    def certificates(self) -> Mapping[DeviceId, str]: ...
    def on_hello(self, device: DeviceId, hello: Hello) -> None: ...
    def on_up(self, device: DeviceId, address: str) -> None: ...
    def on_member(self, change: m.Changed) -> None: ...
    def on_message(self, device: DeviceId, message: Control) -> None: ...


class ControlLinks:
    """Keeps one channel in use per device. Feed it what happens; it does what membership answers."""

    def __init__(self, identity: Identity, static: tuple[m.Address, ...], watcher: LinkListener) -> None:
        self.membership = Membership(identity.device, static)
        self.problems: dict[m.Address, str] = {}  # of `--peer` addresses that cannot be used
        self._identity = identity
        self._watcher = watcher
        self._channels: dict[m.LinkName, ControlChannel] = {}
        self._shares = ReadingShares()
        self._using: dict[DeviceId, ControlChannel] = {}
        self._accepted: Counter[DeviceId] = Counter()
        self._dials: set[asyncio.Task[None]] = set()
        self._timer: tuple[float, asyncio.Handle] | None = None  # with what it is set to: not all loops' handles tell
        self._session: aiohttp.ClientSession | None = None
        # Grows over restarts too where there is a clock, so that of two links a device dialled the newest is known.
        self._numbers = itertools.count(time.time_ns() // 1000)
        self._largest: dict[DeviceId, int] = {}  # number of a link with it
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._closing = False

    async def start(self) -> None:
        self._session = dialling_session(MAX_LINKS)

    def feed(self, event: m.Event) -> None:
        """Hand an event to membership and do what it says."""
        if self._closing:
            return
        for action in self.membership.handle(event, asyncio.get_running_loop().time()):
            self._do(action)
        if not isinstance(event, m.Heard):
            self._arm()

    def channel(self, device: DeviceId) -> ControlChannel:
        """The channel to send on; LinkError if the device is away."""
        channel = self._using.get(device)
        if channel is None:
            member = self.membership.members.get(device)
            raise LinkError(f"{device[:8]} is away: {member.reason}" if member else f"no device {device[:8]} here")
        return channel

    def find(self, device: DeviceId) -> ControlChannel | None:
        return self._using.get(device)

    def spend(self, device: DeviceId, busy_s: float) -> None:
        """Count work for a device beside what its messages cost when they are read."""
        self._shares.budget(device).spend(0, busy_s, time.monotonic())

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """GET /control/{number}: a device that dialled this one."""
        device = peer_device(request)
        number = request.match_info["number"]
        if not number.isascii() or not number.isdigit() or len(number) > 16:
            raise web.HTTPBadRequest
        link = m.LinkName(device, int(number))
        if self._closing or self._accepted[device] >= MAX_LINKS_PER_DEVICE or link in self._channels:
            raise web.HTTPServiceUnavailable
        self._accepted[device] += 1
        try:
            websocket = web.WebSocketResponse(
                timeout=CLOSE_TIMEOUT_S, max_msg_size=FRAME_BYTES + 1, compress=False, heartbeat=None
            )
            await websocket.prepare(request)
            host = host_of(request.get_extra_info("peername"))
            await self._serve(websocket, link, device, host, None)
            return websocket
        finally:
            self._accepted[device] -= 1
            if not self._accepted[device]:
                del self._accepted[device]

    async def last_words(self, devices: Iterable[DeviceId], message: Control, reason: str) -> None:
        """Tell devices that are here one thing more and end their links; waits a bounded moment for it to be sent."""
        channels = [channel for device in devices if (channel := self._using.get(device)) is not None]
        for channel in channels:
            channel.send(message)
            channel.finish(reason)
        if channels:
            await asyncio.wait([channel.ended for channel in channels], timeout=FLUSH_S)

    async def close(self, reason: str) -> None:
        """Say goodbye on every link and end them all."""
        self._closing = True
        if self._timer is not None:
            self._timer[1].cancel()
        for channel in list(self._channels.values()):
            channel.send(Goodbye(reason))
            channel.finish(reason)
        waiting = {task for task in self._dials if not task.done()}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._none_left.wait()
        for channel in list(self._channels.values()):
            channel.end(reason)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    # ---- actions ----

    def _do(self, action: m.Action) -> None:
        match action:
            case m.Dial():
                task = asyncio.create_task(self._dial(action), name=f"dial-{str(action.target)[:24]}")
                self._dials.add(task)
                task.add_done_callback(self._dials.discard)
            case m.Use(device, link):
                self._using[device] = self._channels[link]
            case m.Retire(link):
                self._end_later(link)
            case m.Cut(link, reason):
                if (channel := self._channels.get(link)) is not None:
                    if self._using.get(channel.device) is channel:
                        del self._using[channel.device]
                    channel.end(reason)
            case m.Beat(link):
                if (channel := self._channels.get(link)) is not None:
                    channel.beat()
            case m.Changed(device, _, state):
                if state not in m.LINKED:
                    self._using.pop(device, None)
                self._watcher.on_member(action)

    def _end_later(self, link: m.LinkName) -> None:
        channel = self._channels.get(link)
        if channel is not None:
            asyncio.get_running_loop().call_later(DRAIN_S, channel.end, "another link to this device is kept")

    def _arm(self) -> None:
        deadline = self.membership.deadline()
        if self._timer is not None:
            at, handle = self._timer
            if at == deadline:
                return
            handle.cancel()
            self._timer = None
        if deadline is not None and not self._closing:
            self._timer = deadline, asyncio.get_running_loop().call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(m.Tick())

    # ---- one link ----

    async def _dial(self, order: m.Dial) -> None:
        assert self._session is not None
        certificates = self._watcher.certificates()
        target = order.target
        try:
            if isinstance(target, tuple):
                device = await who_answers(self._identity, certificates.values(), *target)
                self.problems.pop(target, None)
            else:
                device = target
            if device not in certificates:
                raise LinkError(f"{device[:8]} is no longer of the household")
            number = self._next_number(device)
            websocket, host = await dial_first(
                self._session,
                self._identity,
                device,
                certificates[device],
                order.hosts,
                order.port,
                f"/control/{number}",
                FRAME_BYTES,
            )
        except (LinkError, AuthenticationError) as error:
            if isinstance(target, tuple):
                self.problems[target] = str(error)
            self.feed(m.DialFailed(target, str(error)))
            return
        member = self.membership.members.get(device)
        if target == device and member is not None and member.link is not None and not member.quiet:  # it was heard
            await websocket.close()
            self.feed(m.DialFailed(target, "another link stands"))
            return
        with caused_by(""):  # it outlives a request that may have begun it
            await self._serve(websocket, m.LinkName(self._identity.device, number), device, host, order)

    def _next_number(self, device: DeviceId) -> int:
        """Above those of all links with the device, whoever dialled them: the newest link is kept."""
        number = self._largest[device] = max(next(self._numbers), self._largest.get(device, 0) + 1)
        return number

    async def _serve(
        self, websocket: WebSocket, link: m.LinkName, device: DeviceId, host: str, order: m.Dial | None
    ) -> None:
        target = order.target if order is not None else None
        channel = ControlChannel(websocket, link, device, host, self._shares)
        try:
            hello = await channel.greet(self._watcher.hello())
        except LinkError as error:
            log.warning("no control link with %s: %s", device[:8], error)
            if isinstance(error, ProtocolMismatch):
                self.feed(m.Incompatible(device, str(error), target))
            elif target is not None:
                self.feed(m.DialFailed(target, str(error)))
            channel.end(str(error))
            await channel.run(lambda: None, lambda message: None)
            return
        if self._closing:
            channel.end("going down")
        self._channels[link] = channel
        self._largest[device] = max(self._largest.get(device, 0), link.number)
        self._none_left.clear()
        try:
            self._watcher.on_hello(device, hello)
            self.feed(m.Up(link, device, host, hello.control_port, target))
            if self._using.get(device) is channel:
                address = host_of(websocket.get_extra_info("peername"))
                self._watcher.on_up(device, address or host)
            await channel.run(lambda: self.feed(m.Heard(link)), lambda message: self._take(channel, message))
        finally:
            self._channels.pop(link, None)
            if not self._channels:
                self._none_left.set()
            channel.end("closed")
            self.feed(m.Down(link, channel.ended.result()))  # also where the lost connection cancels this

    def _take(self, channel: ControlChannel, message: Control) -> None:
        if isinstance(message, Goodbye):
            self.feed(m.Farewell(channel.link, message.reason[:200]))
        if isinstance(message, (Hello, DeviceView, LinkTable)) and self._using.get(channel.device) is not channel:
            return  # it was held up on a link that is not used any more, and is told anew over the other
        self._watcher.on_message(channel.device, message)
