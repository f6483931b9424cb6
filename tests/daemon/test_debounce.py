"""Bursts of changes: one beat at once, one for the rest, and nobody who watches misses the last."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from peerllm.daemon.debounce import Debounce

BOUND_S = 10.0


class Beats(list[float]):
    def __init__(self) -> None:
        self.news = asyncio.Event()

    def beat(self) -> None:
        self.append(asyncio.get_running_loop().time())
        self.news.set()

    async def count(self, number: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while len(self) < number:
                self.news.clear()
                await self.news.wait()


async def test_a_burst_is_one_beat_at_once_and_one_after_the_interval() -> None:
    beats = Beats()
    pulse = Debounce(0.05, beats.beat)
    for _ in range(5):
        pulse.poke()
    await beats.count(1)
    for _ in range(5):
        pulse.poke()
    await beats.count(2)
    assert beats[1] - beats[0] >= 0.05 * 0.99
    pulse.poke()
    await beats.count(3)
    assert len(beats) == 3 and beats[2] - beats[1] >= 0.05 * 0.99
    pulse.close()


async def test_after_the_end_nothing_beats_and_watchers_end() -> None:
    beats = Beats()
    pulse = Debounce(60.0, beats.beat)
    seen: list[int] = []
    watches = asyncio.Event()

    async def watch() -> None:
        async for _ in pulse.watch():
            seen.append(len(beats))
            watches.set()

    watching = asyncio.ensure_future(watch())
    await asyncio.wait_for(watches.wait(), BOUND_S)
    pulse.poke()
    await beats.count(1)
    pulse.poke()  # due in a minute
    due = pulse._due
    pulse.close()
    await asyncio.wait_for(watching, BOUND_S)
    assert due is not None and due.cancelled()
    pulse.poke()
    assert len(beats) == 1 and seen == [0, 1] and not pulse._watchers


async def test_a_slow_reader_misses_beats_but_not_that_there_were_some() -> None:
    beats = Beats()
    pulse = Debounce(0.0, beats.beat)
    watch = pulse.watch()
    await anext(watch)
    for number in (1, 2, 3):
        pulse.poke()
        await beats.count(number)
    await asyncio.wait_for(anext(watch), BOUND_S)
    again = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    assert not again.done(), "three beats were one change to it"
    pulse.poke()
    await asyncio.wait_for(again, BOUND_S)
    pulse.close()
    with contextlib.suppress(StopAsyncIteration):
        await asyncio.wait_for(anext(watch), BOUND_S)
        pytest.fail("it went on")
