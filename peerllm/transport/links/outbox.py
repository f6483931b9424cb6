"""The sending half of a link: a queue for each channel, written at once by whoever sends, or by the loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import NamedTuple

from peerllm.errors import LinkError
from peerllm.transport.links.channels import CHANNELS, FRAME_COST_BYTES, LinkChannel, grant_payload
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.observer import SentFrame
from peerllm.transport.websocket.framing import BINARY, RECORD_BYTES, control

DIRECT_BYTES = 64 << 10  # of a frame that its sender encrypts itself; the loop writes the rest, while it computes
TURN_BYTES = 256 << 10  # what the loop writes before it looks at other things
MAX_SAID_BYTES = 1024  # PINGs, PONGs and a CLOSE that wait for a frame to be through


class Queued(NamedTuple):
    """A message on its way out; `lane` is a frame's."""

    data: bytes
    lane: Lane | None = None
    cost_bytes: int = 0
    observed: SentFrame | None = None


@dataclass(slots=True, eq=False)
class Lane:
    """One channel's queue, and what the other end has not taken of it."""

    channel: LinkChannel
    bound_bytes: int
    queue: deque[Queued] = field(default_factory=deque)
    queued_bytes: int = 0
    sent_bytes: int = 0  # since the link began, as the other end counts them
    taken_bytes: int = 0  # of those
    empty: asyncio.Event | None = None  # of whoever waits until the queue is empty

    def has_credit(self, cost_bytes: int) -> bool:
        """Whether the other end has room for a frame that counts for so much."""
        untaken = self.sent_bytes - self.taken_bytes
        return not untaken or untaken + cost_bytes <= self.channel.credit_bytes


class Outbox:
    """`put`, `say`, `grant`, `credit` and `end` may be called from any thread, the rest on the loop. Nothing waits.

    `masked` (with zeros) is what a client's messages are. `sent` is called (with the lock held) for each
    frame that was written, with when its writing began (0 unless it is observed). `broke` hears, on the loop, that
    nothing can be written any more, or that a queue was full.
    """

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        masked: bool,
        sent: Callable[[SentFrame | None, int], None] = lambda frame, began_ns: None,
        broke: Callable[[str], None] = lambda reason: None,
        bounds: Mapping[LinkChannel, int] | None = None,
        channels: Iterable[LinkChannel] = CHANNELS,
    ) -> None:
        """`bounds` replace the channels' own."""
        self._connection, self._loop = connection, loop
        self._masked, self._sent, self._broke = masked, sent, broke
        bounds = bounds or {}
        self._lanes = {one: Lane(one, bounds.get(one, one.bound_bytes)) for one in channels}
        self._waiting = 0  # frames in all queues
        self._said = b""
        self._due_grants: dict[LinkChannel, int] = {}
        self._now: Queued | None = None  # being written
        self._rest = memoryview(b"")  # what is left of it
        self._began_ns = 0
        self.ended = ""  # why nothing more is taken; empty while it is
        self._lock = threading.Lock()
        self._due = False  # the loop will write
        self._detached = False  # nothing is written any more
        self._over, self._empty = asyncio.Event(), asyncio.Event()

    def put(self, channel: LinkChannel, nbytes: int, message: bytes, observed: SentFrame | None = None) -> None:
        """Write the message of a frame of `nbytes`, or its beginning; behind others, or without credit, queue it.

        LinkError if the link has ended; also if the channel's queue is full, which ends it.
        """
        with self._lock:
            if self.ended:
                raise LinkError(f"the link has ended: {self.ended}")
            lane, cost_bytes = self._lanes[channel], nbytes + FRAME_COST_BYTES
            if lane.queue and lane.queued_bytes + cost_bytes > lane.bound_bytes:
                reason = f"{len(lane.queue)} frames wait on channel {channel.name}, which is all that may"
                self._end(reason, discard=True)
                self._soon(self._broke, reason)
                raise LinkError(reason)
            lane.queue.append(Queued(message, lane, cost_bytes, observed))
            lane.queued_bytes += cost_bytes
            self._waiting += 1
            self._flush()
            if self.ended:
                raise LinkError(f"the link has ended: {self.ended}")

    def say(self, opcode: int, payload: bytes) -> None:
        """Send a PING, PONG, CLOSE or short message, between frames; left out if too many wait already."""
        message = control(opcode, payload, self._masked)
        with self._lock:
            if len(self._said) + len(message) <= MAX_SAID_BYTES:
                self._said += message
                self._flush()

    def grant(self, channel: LinkChannel, taken_bytes: int) -> None:
        """Tell the other end how many bytes of a channel have been taken here."""
        with self._lock:
            if not self.ended:
                self._due_grants[channel] = taken_bytes
                self._flush()

    def credit(self, channel: LinkChannel, taken_bytes: int) -> bool:
        """The other end has taken so many bytes of a channel; False if it cannot have, or had said more before."""
        with self._lock:
            lane = self._lanes[channel]
            if not lane.taken_bytes <= taken_bytes <= lane.sent_bytes:
                return False
            lane.taken_bytes = taken_bytes
            self._flush()
        return True

    def leaves_at_once(self, channel: LinkChannel, nbytes: int) -> bool:
        """Whether nothing would be before a frame of so many bytes."""
        return not self.busy and not self._waiting and self._lanes[channel].has_credit(nbytes + FRAME_COST_BYTES)

    def end(self, reason: str, discard: bool = False) -> None:
        """Take nothing more. What is queued still goes, unless it is discarded."""
        with self._lock:
            self._end(reason, discard)

    async def wait_ended(self) -> None:
        """Until `end` was called."""
        await self._over.wait()

    async def drained(self, channel: LinkChannel) -> None:
        """Until no frame waits on a channel, or the link has ended."""
        with self._lock:
            lane = self._lanes[channel]
            if not lane.queue or self.ended:
                return
            lane.empty = lane.empty or asyncio.Event()
        await lane.empty.wait()

    async def flushed(self) -> None:
        """Once ended: until nothing is left to write."""
        while True:
            self._empty.clear()
            with self._lock:
                self._flush()
                if self._detached or not (self._waiting or self.busy):
                    return
            await self._empty.wait()

    def detach(self) -> None:
        """Write nothing more; the connection is about to close."""
        with self._lock:
            self._detached = True
        self._loop.remove_writer(self._connection.fd)
        self._empty.set()

    @property
    def busy(self) -> bool:
        """Whether a message is under way: what is said now comes behind it."""
        return self._now is not None or bool(self._said or self._due_grants)

    def __len__(self) -> int:
        """Frames that wait, beside the one under way."""
        return self._waiting

    # ---- with the lock held -----------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Write what goes; the loop goes on with the rest."""
        if not self._due and not self._write(DIRECT_BYTES):
            self._due = True
            self._soon(self._watch)

    def _write(self, budget: int) -> bool:
        """Whether nothing is left that may go now."""
        while not self._detached and (self._now is not None or self._next()):
            if budget <= 0:
                return False
            rest = self._rest
            record = rest if len(rest) <= RECORD_BYTES else rest[:RECORD_BYTES]
            try:
                if not self._connection.write(record):
                    return False
            except OSError as error:
                self._end(f"cannot send: {error}", discard=True)
                self._detached = True
                self._soon(self._give_up)
                return True
            budget -= len(record)
            if record is rest:
                self._done()
            else:
                self._rest = rest[len(record) :]
        if self.ended and not self._waiting:  # nobody waits for it before
            self._soon(self._empty.set)
        return True

    def _next(self) -> bool:
        """Begin with what is to go next; False if nothing may."""
        if self._said:
            queued, self._said = Queued(self._said), b""
        elif self._due_grants:
            queued = Queued(control(BINARY, grant_payload(*self._due_grants.popitem()), self._masked))
        else:
            for lane in self._lanes.values():
                if lane.queue and lane.has_credit(lane.queue[0].cost_bytes):
                    break
            else:
                return False
            queued = lane.queue.popleft()
            lane.queued_bytes -= queued.cost_bytes
            lane.sent_bytes += queued.cost_bytes
            self._waiting -= 1
            if lane.empty is not None and not lane.queue:
                self._tell_empty(lane)
        self._now, self._rest = queued, memoryview(queued.data)
        self._began_ns = 0 if queued.observed is None else perf_counter_ns()
        return True

    def _tell_empty(self, lane: Lane) -> None:
        if lane.empty is not None:
            self._soon(lane.empty.set)
            lane.empty = None

    def _done(self) -> None:
        done, self._now = self._now, None
        if done is not None and done.lane is not None:
            self._sent(done.observed, self._began_ns)

    def _end(self, reason: str, discard: bool) -> None:
        self.ended = self.ended or reason
        for lane in self._lanes.values():
            self._tell_empty(lane)
        if discard:
            for lane in self._lanes.values():
                lane.queue.clear()
            self._waiting = 0
            self._soon(self._empty.set)
        self._soon(self._over.set)

    def _soon(self, call: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits there any more
            self._loop.call_soon_threadsafe(call, *arguments)

    # ---- the loop's part --------------------------------------------------------------------------------------------

    def _give_up(self) -> None:
        self.detach()
        self._broke(self.ended)

    def _watch(self) -> None:
        if not self._detached:
            self._loop.add_writer(self._connection.fd, self._writable)

    def _writable(self) -> None:
        with self._lock:
            if self._write(TURN_BYTES):
                self._due = False
                self._loop.remove_writer(self._connection.fd)
