"""Work in threads that the loop waits for: given up, or told to stop, when nobody wants it any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

Progress = Callable[[float], None]  # 0 to 1
T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, in a thread that nobody waits for at the end: names may take long to be looked up."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            tell(future.set_exception, error)
        else:
            tell(future.set_result, result)

    def tell(say: Callable[..., None], what: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if future.done() else say(what))

    threading.Thread(target=run, name="aside", daemon=True).start()
    return await future


async def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Do it in a thread; with the seconds that a processor worked on it."""

    def run() -> tuple[T, float]:
        began = time.thread_time()
        return work(), time.thread_time() - began

    return await asyncio.to_thread(run)


async def halting(progress: Progress, work: Callable[[Progress, threading.Event], T]) -> T:
    """Do it in a thread, which tells how far it is, and is told to stop when nobody waits any more."""
    loop, halt = asyncio.get_running_loop(), threading.Event()

    def told(share: float) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(progress, share)

    try:
        return await asyncio.to_thread(work, told, halt)
    finally:
        halt.set()
