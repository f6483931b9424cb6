"""Who reads the links that come in: the loop, or whoever has nothing to do but wait for them.

A frame that the compute thread waits for and reads itself wakes one thread instead of two, and none hands it to the
other. While it leads, the loop does not even wake for these links; as soon as it has something to do, they are the
loop's again.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress

MAX_EVENTS = 64  # connections looked at in one go

Read = Callable[[], object]  # takes in what has come, in turn with others
Nothing = Callable[[], bool]


class Poller:
    """The loop reads, always: where there is no epoll. All methods are for the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def add(self, fd: int, read: Read) -> None:
        """From now on `read` is called while there is something."""
        self._loop.add_reader(fd, read)

    def remove(self, fd: int) -> None:
        """Not any more; nothing happens if it was not."""
        self._loop.remove_reader(fd)


class SharedPoller(Poller):
    """One thread at a time may `wait`; `add` and `close` are for the loop, the rest is for any thread.

    The connections are in an epoll object, which lies in another, which the loop watches. Whether the inner one's
    events reach the outer one is all that changes hands.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.waits = False  # a thread sleeps in `wait`: `wake` is due
        self._reads: dict[int, Read] = {}
        self._guard = threading.Lock()
        self._lent = self._closed = self._released = False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._inner, self._outer = select.epoll(), select.epoll()
        self._inner.register(self._bell, select.EPOLLIN)
        self._outer.register(self._inner.fileno(), select.EPOLLIN)
        loop.add_reader(self._outer.fileno(), self._on_loop)

    def add(self, fd: int, read: Read) -> None:
        self._reads[fd] = read
        self._inner.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        if self._reads.pop(fd, None) is not None:
            with suppress(OSError, ValueError):  # it is gone already
                self._inner.unregister(fd)

    def wake(self) -> None:
        """Whoever waits looks again whether there is still nothing."""
        self.waits = False
        with self._guard:
            if not self._released:
                os.eventfd_write(self._bell, 1)

    def wait(self, nothing: Nothing) -> None:
        """Read, in this thread, all that comes in, as long as there is `nothing` else; or until closed."""
        if not nothing() or not self._take():
            return
        try:
            while not self._closed:
                self.waits = True
                found = self._inner.poll(-1, MAX_EVENTS) if nothing() else ()
                self.waits = False
                self._read(found)
                if not nothing():
                    return
        finally:
            self._give_back()

    def close(self) -> None:
        """Once all are removed."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            self._loop.remove_reader(self._outer.fileno())
            if self._lent:
                os.eventfd_write(self._bell, 1)
            else:
                self._release()

    def _take(self) -> bool:
        with self._guard:
            if self._closed or self._lent:
                return False
            self._lent = True
            self._outer.modify(self._inner.fileno(), 0)
            return True

    def _give_back(self) -> None:
        with self._guard:
            self._lent = False
            if self._closed:
                self._release()
            else:
                self._outer.modify(self._inner.fileno(), select.EPOLLIN)

    def _release(self) -> None:
        self._released = True
        self._outer.close()
        self._inner.close()
        os.close(self._bell)

    def _on_loop(self) -> None:
        self._read(self._inner.poll(0, MAX_EVENTS))

    def _read(self, found: list[tuple[int, int]] | tuple[()]) -> None:
        for fd, _ in found:
            if (read := self._reads.get(fd)) is not None:
                read()
            elif fd == self._bell:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)


def shared_poller(loop: asyncio.AbstractEventLoop) -> SharedPoller | None:
    """One where the system has what it takes."""
    return SharedPoller(loop) if hasattr(select, "epoll") and hasattr(os, "eventfd") else None
