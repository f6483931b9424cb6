"""When links are measured: one at a time, not while something goes on, and again when it makes sense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from peerllm.daemon.network.speed import probe_scheduler as module
from peerllm.daemon.network.speed.probe_scheduler import ProbeScheduler
from peerllm.errors import LinkError, PeerLLMError, UnavailableError

A, B = "a" * 64, "b" * 64
BOUND_S = 10.0


class Links:
    """Two links and what happens when one is measured."""

    def __init__(self) -> None:
        self.due, self.quiet = {A, B}, True
        self.errors: dict[str, PeerLLMError] = {}
        self.measured: list[str] = []
        self.at_once = self.most_at_once = 0
        self.news = asyncio.Event()
        self.schedule = ProbeScheduler(self.measure, lambda: (A, B), self.due.__contains__, lambda: self.quiet)

    async def measure(self, device: str) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.schedule.measuring
        await asyncio.sleep(0)
        self.at_once -= 1
        if device not in self.errors:
            self.due.discard(device)
        self.measured.append(device)
        self.news.set()
        if device in self.errors:
            raise self.errors[device]

    async def count(self, number: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while len(self.measured) < number:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
async def links() -> AsyncIterator[Links]:
    made = Links()
    made.schedule.start()
    yield made
    await made.schedule.close()


async def test_one_after_the_other_and_only_what_is_due(links: Links) -> None:
    links.schedule.connected(A)
    links.schedule.connected(B)
    await links.count(2)
    assert links.measured == [A, B] and links.most_at_once == 1
    links.due.add(B)
    links.schedule.connected(A)
    await links.count(3)
    assert links.measured[2:] == [B]


async def test_a_link_that_failed_is_left_alone_until_the_device_is_back(links: Links) -> None:
    links.errors[A] = LinkError("no way")
    links.schedule.connected(A)
    await links.count(2)
    links.due.add(B)
    links.schedule.connected(B)
    await links.count(3)
    assert links.measured == [A, B, B], "not A, which failed just now"
    links.schedule.connected(A)
    await links.count(4)
    assert links.measured[3] == A


async def test_a_busy_device_is_asked_again_soon(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    links.schedule._busy_s = 0.01
    links.errors[A] = UnavailableError("it is busy")
    links.schedule.connected(A)
    await links.count(4)
    assert links.measured.count(B) == 1 and module.FAILED_S > BOUND_S
    links.schedule.keep_only({B})
    assert A not in links.schedule._not_before


async def test_nothing_is_measured_while_something_goes_on(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    links.quiet = False
    looks: list[str] = []
    monkeypatch.setattr(links.schedule, "_online", lambda: (looks.append("look"), links.news.set(), (A, B))[2])
    links.schedule.connected(A)
    async with asyncio.timeout(BOUND_S):
        while len(looks) < 3:
            links.news.clear()
            await links.news.wait()
    assert not links.measured
    links.quiet = True
    await links.count(2)


async def test_a_link_that_came_up_while_something_went_on_is_measured_soon_after(links: Links) -> None:
    """Two devices that met measure each other at once: who finds the other at it must not leave it at that."""
    links.schedule._busy_s = 0.01
    asked = asyncio.Event()

    def quiet() -> bool:
        asked.set()
        return links.quiet

    links.schedule._quiet = quiet
    links.quiet = False
    links.schedule.connected(A)
    async with asyncio.timeout(BOUND_S):
        await asked.wait()
    assert not links.measured and module.CHECK_S > BOUND_S
    links.quiet = True
    await links.count(2)
