"""One connection with another device: frames both ways on typed channels, signs of life, and how it ends."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from time import perf_counter, perf_counter_ns
from typing import Any

from peerllm.errors import FrameError, PeerLLMError
from peerllm.transport.frames.encoder import encode_buffers
from peerllm.transport.frames.frame import Frame
from peerllm.transport.links import liveness
from peerllm.transport.links.channels import CHANNEL_OF_KIND, Inlet, LinkChannel
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.frame_timer import FrameTimer, OnTimed, answer
from peerllm.transport.links.inbound import Inbound
from peerllm.transport.links.observer import NO_OBSERVER, LinkObserver, SentFrame
from peerllm.transport.links.outbox import Outbox
from peerllm.transport.links.poller import Poller
from peerllm.transport.timeouts import CLOSE_TIMEOUT_S
from peerllm.transport.websocket.framing import (
    BINARY,
    CLOSE,
    GOING_AWAY,
    INTERNAL_ERROR,
    OK,
    PING,
    POLICY_VIOLATION,
    PONG,
    control,
    goodbye,
    head,
    read_goodbye,
)
from peerllm.types import DeploymentId, DeviceId

FLUSH_TIMEOUT_S = 2.0  # what an orderly close gives the frames still queued


class Link:
    """`send` and `close` may be called from any thread, the rest on the loop.

    `lost` is why the link broke; empty while it has not, and after either side ended it on purpose.
    """

    def __init__(
        self,
        connection: Connection,
        deployment: DeploymentId,
        epoch: int,
        stage: int,
        ended: Callable[[Link], None],
        poller: Poller,
        *,
        dialled: bool,
        inlets: Sequence[Inlet] = (),
        bounds: Mapping[LinkChannel, int] | None = None,
        timed: OnTimed | None = None,
        observer: LinkObserver = NO_OBSERVER,
    ) -> None:
        """`poller` reads it, `inlets` are what is taken in here, `bounds` replace the channels' own for what is sent.

        `ended` (on the loop) is called once. `timed` (on the thread that reads) hears, a few times a second at most,
        how long a frame of so many bytes took.
        """
        self.device: DeviceId = connection.device
        self.deployment, self.epoch, self.stage = deployment, epoch, stage
        self.lost = ""
        self.timer = FrameTimer(timed)
        self._connection, self._poller, self._masked = connection, poller, dialled
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(connection, self._loop, dialled, self._sent, self._cannot_send, bounds)
        self._inbound = Inbound(
            connection,
            self._loop,
            inlets,
            not dialled,
            self._hear,
            self._outbox.credit,
            self._outbox.grant,
            self._fail,
            observer,
        )
        self._observer = observer
        self._number = 0  # of frames sent
        self._heard_the_end = asyncio.Event()  # the other side's CLOSE came, or the connection broke
        self._orderly = self._told = False  # ended on purpose by either side; `ended` has heard how it ended
        self._farewell = b""  # the payload of our CLOSE, if it is not the usual one
        self._ended = ended
        name = f"link {self.device[:8]} {deployment[:8]}/{epoch}/{stage}"
        poller.add(connection.fd, self._inbound.read)
        self.task = self._loop.create_task(self._run(name), name=name)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent."""
        return bool(self._outbox.ended)

    def send(self, frame: Frame) -> None:
        """Send or queue a frame on its kind's channel; its tensors are copied, so their memory may be used again.

        Never waits. LinkError if the link has ended; also if the channel's queue is full, which ends it.
        """
        since = perf_counter_ns()
        channel = CHANNEL_OF_KIND[frame.kind]
        buffers = encode_buffers(frame)
        nbytes = sum([len(buffer) for buffer in buffers])
        before = head(BINARY, nbytes, self._masked)
        ping = self._ping(channel, len(before) + nbytes)
        data = b"".join((before, *buffers, ping))
        observed = None
        if self._observer.on:
            observed = SentFrame(frame.kind, frame.runs, nbytes, since, perf_counter_ns())
        self._outbox.put(channel, nbytes, data, observed)
        if ping:
            self.timer.handed_over(perf_counter())

    async def drained(self, channel: LinkChannel) -> None:
        """Until no frame waits for credit or the line on a channel, or the link has ended; for bulk senders."""
        await self._outbox.drained(channel)

    def close(self, reason: str = "") -> None:
        """Take in no more frames, let those queued go (at most FLUSH_TIMEOUT_S), then end; not reported as lost."""
        self._orderly = self._inbound.closing = True
        self._farewell = self._farewell or goodbye(OK, reason)
        self._outbox.end("closed")

    def abort(self, reason: str) -> None:
        """End the link now, and report it lost unless it has ended already; may be called from any thread, too."""
        self._inbound.closing = True
        if not self._told and not self._orderly:
            self.lost = self.lost or reason
        self._outbox.end(reason, discard=True)

    def replace(self) -> None:
        """Make way for a new connection of the same sender; lost only if frames may be missing."""
        self._orderly = self._orderly or not self._inbound.frames
        self.abort("replaced by a new connection")

    async def wait_closed(self) -> None:
        """Until the connection has been given back."""
        await asyncio.wait({self.task})

    def beat(self) -> None:
        """Give a sign of life, which may ask for one; behind a frame under way it must not wait, and need not."""
        if self._outbox.busy:
            return
        ping = self.timer.beat(perf_counter()) if not len(self._outbox) and not self._connection.unsent() else None
        self._outbox.say(PONG, b"") if ping is None else self._outbox.say(PING, ping)

    def _ping(self, channel: LinkChannel, nbytes: int) -> bytes:
        """What goes behind a frame of so many bytes, in one piece with it, to time it; mostly nothing.

        Only a frame that leaves at once is timed: behind something else it would be the other's time as well.
        """
        if not self.timer.wanted or not self._outbox.leaves_at_once(channel, nbytes) or self._connection.unsent():
            return b""
        ping = self.timer.ask(nbytes, perf_counter())
        return b"" if ping is None else control(PING, ping, self._masked)

    async def _run(self, name: str) -> None:
        watching = liveness.watch(lambda: self._inbound.arrived_at, self.beat, self.abort)
        beat = self._loop.create_task(watching, name=f"{name} beat")
        try:
            await self._outbox.wait_ended()
            if not self.lost:
                await _at_most(FLUSH_TIMEOUT_S, self._outbox.flushed())
        finally:
            self._inbound.closing = True
            self._outbox.end(self.lost or "closed", discard=True)
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
            self._told = True
            self._ended(self)
            try:
                await self._say_goodbye()
            finally:
                self._outbox.detach()
                self._poller.remove(self._connection.fd)
                self._connection.close()

    async def _say_goodbye(self) -> None:
        """What still comes is dropped: closed with bytes unread, the system would drop the goodbye instead."""
        if self._outbox.busy:  # in the middle of a frame nothing else can be said
            return
        self._outbox.say(CLOSE, self._farewell or goodbye(GOING_AWAY if self.lost else OK, self.lost))
        await _at_most(CLOSE_TIMEOUT_S, self._heard_the_end.wait())

    def _sent(self, observed: SentFrame | None, began_ns: int) -> None:
        """By whichever thread wrote the last of it."""
        self._number += 1
        if observed is not None:
            to = self.deployment, self.device, self.stage
            self._observer.sent(to, self._number, observed, began_ns, perf_counter_ns())

    def _cannot_send(self, reason: str) -> None:
        while not self._connection.closed and not self._heard_the_end.is_set() and self._inbound.read():
            pass  # the other side may have said why
        self.abort(reason)

    # ---- in turn, on whichever thread reads -------------------------------------------------------------------------

    def _hear(self, opcode: int, payload: bytes) -> None:
        if opcode == PONG:
            self.timer.ponged(payload, perf_counter())
        elif opcode == PING:
            self._outbox.say(PONG, answer(payload, self._inbound.taken_at, perf_counter()))
        else:
            code, reason = read_goodbye(payload)
            self._farewell = self._farewell or goodbye(OK, "")
            self._over()
            if code == OK:
                self._orderly = True
                self._outbox.end("the other side has closed it", discard=True)
            else:
                self.abort(reason or f"closed by the other side (code {code})")

    def _fail(self, error: Exception) -> None:
        match error:
            case PeerLLMError():  # a frame the plan does not allow, or no room for it
                reason, code = str(error), POLICY_VIOLATION if isinstance(error, FrameError) else INTERNAL_ERROR
            case OSError():
                self._over()
                self.abort(f"the connection broke{f': {error}' if str(error) else ''}")
                return
            case _:  # a fault of ours must not end a link in silence
                traceback.print_exception(error)
                reason, code = f"{type(error).__name__}: {error}", INTERNAL_ERROR
        self._farewell = self._farewell or goodbye(code, reason)
        self.abort(reason)

    def _over(self) -> None:
        """Nothing more will be heard."""
        self._inbound.over = True
        self._poller.remove(self._connection.fd)  # it would go on saying that there is something
        self._loop.call_soon_threadsafe(self._heard_the_end.set)


async def _at_most(seconds: float, wait: Coroutine[Any, Any, object]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await wait
