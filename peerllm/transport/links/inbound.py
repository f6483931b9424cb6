"""The reading half of a link: messages and frames, taken in by whichever thread has time for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from time import perf_counter, perf_counter_ns

from peerllm.errors import FrameError
from peerllm.transport.frames.decoder import decode, kind_of
from peerllm.transport.links.channels import (
    FRAME_COST_BYTES,
    GRANT_MAGIC,
    Delivery,
    Inlet,
    LinkChannel,
    Mailbox,
    read_grant,
)
from peerllm.transport.links.connection import Connection
from peerllm.transport.links.observer import LinkObserver
from peerllm.transport.websocket.framing import BINARY, MessageReader

READS = 32  # records of one connection in a row, before others have their turn
MAX_ANSWER_BYTES = 1024  # of a message to an end that takes in no frames


class Inbound:
    """`read` may be called by any thread, in turn. What a link hears there must be cheap.

    `hear` gets PINGs, PONGs and CLOSE, `credit` what the other end has taken of a channel (false: that cannot be),
    `grant` what it is to be told to have been taken here.
    `fail` gets what ends the link: FrameError and what `deliver` raises; OSError if the connection broke.
    """

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        inlets: Sequence[Inlet],
        masked: bool,
        hear: Callable[[int, bytes], None],
        credit: Callable[[LinkChannel, int], bool],
        grant: Callable[[LinkChannel, int], None],
        fail: Callable[[Exception], None],
        observer: LinkObserver,
    ) -> None:
        self.frames = 0  # that came in
        self.taken_at = perf_counter()  # when the last of them was handed on
        self.arrived_at = self.taken_at  # when anything was read last
        self.closing = False  # frames are dropped from now on
        self.deaf = False  # all is dropped: what comes makes no sense any more
        self.over = False  # nothing is read any more
        self._connection, self._loop = connection, loop
        self._hear, self._credit, self._grant, self._fail = hear, credit, grant, fail
        self._observer = observer
        self._mailboxes = [Mailbox(inlet) for inlet in inlets]
        self._by_kind: dict[int, Mailbox] = {kind: box for box in self._mailboxes for kind in box.inlet.limits.kinds}
        self._by_channel = {box.inlet.channel: box for box in self._mailboxes}
        largest = max((inlet.limits.max_bytes for inlet in inlets), default=MAX_ANSWER_BYTES)
        self._reader = MessageReader(largest, masked)
        self._turn = threading.Lock()  # frames are taken in one after the other, in their order

    def read(self) -> bool:
        """Take in what has come; whether there may be more."""
        with self._turn:
            try:
                for _ in range(READS):
                    if self.over or not self._fill():
                        return False
                    if not self._take_in():
                        return True
            except Exception as error:
                self.deaf = True
                self._fail(error)
        return True

    def taken(self, delivery: Delivery) -> None:
        """A frame waits no longer here; by its channel's reader."""
        if (taken_bytes := self._by_channel[delivery.channel].take(delivery.cost_bytes)) is not None:
            self._grant(delivery.channel, taken_bytes)

    def _fill(self) -> bool:
        """Whether anything came."""
        nbytes = self._connection.read(self._reader.room)
        if nbytes is None:
            return False
        if nbytes == 0:
            raise ConnectionError
        self.arrived_at = perf_counter()
        if not self.deaf:
            self._reader.filled(nbytes)
        return True

    def _take_in(self) -> bool:
        """All messages that are complete; whether to read on at once: a larger one has begun."""
        if self.deaf:
            return True
        while (message := self._reader.next()) is not None:
            opcode, payload = message
            if opcode != BINARY:
                self._hear(opcode, bytes(payload))
            elif payload[:4] == GRANT_MAGIC:
                if not self._credit(*read_grant(payload)):
                    raise FrameError("a grant of credit for what was not sent")
            else:
                self._take_in_frame(payload)
        return self._reader.missing

    def _take_in_frame(self, payload: bytes | bytearray) -> None:
        self.frames += 1
        if self.closing:
            return
        if not self._mailboxes:
            raise FrameError("the other side spoke out of turn")
        mailbox = self._by_kind.get(kind_of(payload), self._mailboxes[0])  # whose limits say what is wrong with it
        came_ns = perf_counter_ns() if self._observer.on else 0
        inlet, cost_bytes = mailbox.inlet, len(payload) + FRAME_COST_BYTES
        frame = decode(payload, inlet.limits)
        mailbox.add(cost_bytes)
        delivery = Delivery(inlet.channel, frame, cost_bytes, self.taken)
        if inlet.channel.reader == "loop":
            self._loop.call_soon_threadsafe(self._deliver_on_loop, inlet, delivery)
        else:
            inlet.deliver(delivery)
        self.taken_at = perf_counter()
        if came_ns:
            now_ns = perf_counter_ns()
            self._observer.received(self._connection.device, frame, self.frames, len(payload), came_ns, now_ns)

    def _deliver_on_loop(self, inlet: Inlet, delivery: Delivery) -> None:
        with self._turn:
            if self.closing or self.deaf:
                return
            try:
                inlet.deliver(delivery)
            except Exception as error:
                self.deaf = True
                self._fail(error)
