"""Noticing a dead peer. Each side beats, whatever else it does, and counts how long nothing at all has arrived.

Silence is not death: whether to go on without a silent device is decided over the control links, much sooner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter

BEAT_S = 0.5  # a PING or an unasked-for PONG: the loop sends it, a busy compute thread does not delay it
SILENCE_S = 60.0  # nothing for so long: the peer will not be back


async def watch(arrived_at: Callable[[], float], beat: Callable[[], None], dead: Callable[[str], None]) -> None:
    """Until cancelled: call `beat`, which must not wait; call `dead` with the reason, once, when the peer is silent.

    `arrived_at` says when anything was read last (`perf_counter`).
    """
    not_before = 0.0  # silence counts from here on
    while True:
        before = perf_counter()
        await asyncio.sleep(BEAT_S)
        now = perf_counter()
        if now - before > 2 * BEAT_S:
            not_before = now  # it was this loop that slept
        if (silent_s := now - max(arrived_at(), not_before)) > SILENCE_S:
            dead(f"nothing heard for {silent_s:.1f} s")
            return
        beat()
