"""The sending half of a connection: a bounded queue of frames, written at once by who sends them, or by the loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, perf_counter_ns
from typing import NamedTuple, Protocol

from peerllm.errors import LinkError
from peerllm.transport.links.watch import Parting
from peerllm.transport.links.websocket import RECORD_BYTES

SEND_QUEUE_FRAMES = 64
SEND_QUEUE_BYTES = 64 << 20  # a single larger frame still goes, alone
SEND_TIMEOUT_S = 60.0  # a slow stage may take its time; a dead one is noticed by its silence long before
DIRECT_BYTES = 64 << 10  # of a frame that its sender encrypts itself; the rest goes by the loop, while it computes
TURN_BYTES = 256 << 10  # what the loop writes before it looks at other things
MAX_SAID_BYTES = 1024  # PINGs, PONGs and a CLOSE that wait for a frame to be through


class Writes(Protocol):
    """What an outbox needs of a connection."""

    fd: int

    def write(self, record: memoryview | bytes) -> bool: ...


class Queued(NamedTuple):
    """A message on its way out."""

    data: bytes
    parting: Parting | None = None  # of a watched frame
    frame: bool = True  # not something said


class Outbox:
    """`put`, `say`, `flush` and `end` from any thread, the rest on the loop.

    `sent` is called (with the lock held) for each frame that was written, with when its writing began (0 unless it is
    watched). `broke` hears, on the loop, that nothing can be written any more.
    """

    def __init__(
        self,
        connection: Writes,
        loop: asyncio.AbstractEventLoop,
        sent: Callable[[Parting | None, int], None] = lambda parting, began_ns: None,
        broke: Callable[[str], None] = lambda reason: None,
        max_frames: int = SEND_QUEUE_FRAMES,
        max_bytes: int = SEND_QUEUE_BYTES,
    ) -> None:
        self._connection, self._loop = connection, loop
        self._sent, self._broke = sent, broke
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._frames: deque[Queued] = deque()
        self._bytes = 0
        self._said = b""
        self._now: Queued | None = None  # being written
        self._rest = memoryview(b"")  # what is left of it
        self._began_ns = 0
        self._ended = ""  # why nothing more is taken
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._due = False  # the loop will write
        self._detached = self._off = False  # nothing is written any more; the loop has been told
        self._over, self._empty = asyncio.Event(), asyncio.Event()

    def put(self, frame: bytes, timeout_s: float = SEND_TIMEOUT_S, parting: Parting | None = None) -> bool:
        """Write a frame, or its beginning; behind others queue it, and where the queue is full wait for room.

        Whether it was its turn at once. LinkError after `timeout_s`, or once the link has ended. On the loop's own
        thread it never waits: that would stop what makes room.
        """
        with self._lock:
            queued = Queued(frame, parting)
            if self._frames and not self._ended and not self._fits(len(frame)):
                self._wait_for_room(len(frame), timeout_s)
            if self._ended:
                raise LinkError(f"the link has ended: {self._ended}")
            at_once = self._now is None and not self._frames and not self._said
            if at_once:
                self._begin(queued)
            else:
                self._frames.append(queued)
                self._bytes += len(frame)
            if not self._due and not self._write(DIRECT_BYTES):
                self._call_the_loop()
            if at_once and self._ended:
                raise LinkError(f"the link has ended: {self._ended}")
            return at_once

    def say(self, message: bytes) -> bool:
        """Send a PING, PONG or CLOSE, between frames; False if too many wait already."""
        with self._lock:
            if len(self._said) + len(message) > MAX_SAID_BYTES:
                return False
            self._said += message
        self.flush()
        return True

    def flush(self) -> None:
        """Write what goes; the loop goes on with the rest."""
        with self._lock:
            if not self._due and not self._write(DIRECT_BYTES):
                self._call_the_loop()

    def end(self, reason: str, discard: bool = False) -> None:
        """Take nothing more; whoever waits for room gets LinkError. What is queued still goes, unless discarded."""
        with self._lock:
            self._end(reason, discard)

    async def wait_ended(self) -> None:
        """Until `end` was called."""
        await self._over.wait()

    async def flushed(self) -> None:
        """Until nothing is left to write."""
        while not self._detached and (len(self) or self.busy):
            self._empty.clear()
            self.flush()
            if not self._detached and (len(self) or self.busy):
                await self._empty.wait()

    def detach(self) -> None:
        """Write nothing more; the connection is about to close."""
        with self._lock:
            if not self._off:
                self._detached = self._off = True
                self._loop.remove_writer(self._connection.fd)
        self._empty.set()

    @property
    def ended(self) -> str:
        """Why nothing more is taken; empty while it is."""
        return self._ended

    @property
    def busy(self) -> bool:
        """Whether a message is under way: what is said now comes behind it."""
        return self._now is not None or bool(self._said)

    def __len__(self) -> int:
        """Frames that wait, beside the one under way."""
        return len(self._frames)

    # ---- with the lock held -----------------------------------------------------------------------------------------

    def _write(self, budget: int) -> bool:
        """Whether nothing is left."""
        while self._now is not None or self._said or self._frames:
            if budget <= 0 or self._detached:
                return self._detached
            if self._now is None:
                self._next()
            rest = self._rest
            record = rest if len(rest) <= RECORD_BYTES else rest[:RECORD_BYTES]
            try:
                if not self._connection.write(record):
                    return False
            except OSError as error:
                self._breaks(error)
                return True
            budget -= len(record)
            if record is rest:
                self._done()
            else:
                self._rest = rest[len(record) :]
        return True

    def _breaks(self, error: OSError) -> None:
        """Nothing can be written any more."""
        self._end(f"cannot send: {error}", discard=True)
        self._detached = True
        self._soon(self._give_up)

    def _next(self) -> None:
        if self._said:
            said, self._said = self._said, b""
            self._begin(Queued(said, frame=False))
            return
        queued = self._frames.popleft()
        self._bytes -= len(queued.data)
        self._room.notify()
        self._begin(queued)

    def _begin(self, queued: Queued) -> None:
        self._now, self._rest = queued, memoryview(queued.data)
        self._began_ns = 0 if queued.parting is None else perf_counter_ns()

    def _done(self) -> None:
        done, self._now = self._now, None
        if done is not None and done.frame:
            self._sent(done.parting, self._began_ns)

    def _end(self, reason: str, discard: bool) -> None:
        if not self._ended:
            self._ended = reason
        if discard:
            self._frames.clear()
            self._bytes = 0
        self._room.notify_all()
        self._soon(self._over.set)

    def _wait_for_room(self, size: int, timeout_s: float) -> None:
        deadline = monotonic() + (0.0 if self._on_loop() else timeout_s)
        while not self._ended and not self._fits(size):
            left = deadline - monotonic()
            if left <= 0:
                raise LinkError(f"{len(self._frames)} frames wait and none left within {timeout_s:g} s")
            self._room.wait(left)

    def _fits(self, size: int) -> bool:
        if not self._frames:
            return True
        return len(self._frames) < self._max_frames and self._bytes + size <= self._max_bytes

    # ---- the loop's part --------------------------------------------------------------------------------------------

    def _call_the_loop(self) -> None:
        self._due = True
        self._soon(self._watch)

    def _give_up(self) -> None:
        self.detach()
        self._broke(self._ended)

    def _watch(self) -> None:
        if not self._detached:
            self._loop.add_writer(self._connection.fd, self._writable)

    def _writable(self) -> None:
        with self._lock:
            if not self._write(TURN_BYTES):
                return
            self._due = False
            self._loop.remove_writer(self._connection.fd)
        self._empty.set()

    def _soon(self, call: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody waits there any more
            self._loop.call_soon_threadsafe(call, *arguments)

    def _on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False
