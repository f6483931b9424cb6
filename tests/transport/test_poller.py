"""A compute thread that reads its links itself while it waits: none lost, none twice, in order, and it always ends."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import SimpleQueue

import pytest
import uvloop

from peerllm.engine.process.inbox import Inbox
from peerllm.errors import LinkError
from peerllm.transport.frames.frame import Frame
from peerllm.transport.identity import Identity
from peerllm.transport.links.channels import STEP, Delivery, Inlet
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link
from peerllm.transport.links.poller import Poller, SharedPoller
from tests.transport.planes import DEPLOYMENT, LIMITS, WAIT_S, Node, activation, connect

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="epoll")


class Taker(threading.Thread):
    """A compute thread: takes from its inbox, and works on what it took for a while, or not."""

    def __init__(self, poller: SharedPoller | None, work: Callable[[], object] = lambda: None) -> None:
        super().__init__(daemon=True)
        self.inbox: Inbox[tuple[int, int]] = Inbox()
        self.inbox.poller = poller
        self.taken: list[tuple[int, int]] = []  # stage, position
        self.readers: set[int] = set()  # threads that read frames
        self._work = work
        self._goal, self._reached = 0, threading.Event()
        self.start()

    def deliver(self, delivery: Delivery) -> None:
        delivery.taken()
        self.readers.add(threading.get_ident())
        self.inbox.put((delivery.frame.stage, delivery.frame.runs[0].position))

    def run(self) -> None:
        while (events := self.inbox.take(wait=True)) is not None:
            self.taken += events
            if len(self.taken) >= self._goal:
                self._reached.set()
            self._work()

    async def until(self, count: int) -> None:
        self._goal = count
        if len(self.taken) < count:
            self._reached.clear()
            if len(self.taken) < count:
                assert await asyncio.to_thread(self._reached.wait, WAIT_S), len(self.taken)

    async def end(self) -> None:
        self.inbox.close()
        await asyncio.to_thread(self.join, WAIT_S)
        assert not self.is_alive()


def until_it_waits(poller: SharedPoller) -> None:
    while not poller.waits:
        pass


def expect(node: Node, sender: Node, taker: Taker, stage: int = 1) -> None:
    node.plane.expect(sender.identity.device, Inlet(STEP, replace(LIMITS, stage=stage), taker.deliver))


def frame(position: int, tokens: int = 1, stage: int = 1) -> Frame:
    return replace(activation(position, tokens), stage=stage)


async def test_who_waits_reads_and_the_loop_sleeps(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    taker = Taker(two.plane.poller)
    expect(two, one, taker)
    link = await connect(one, two)
    poller = two.plane.poller
    assert poller is not None
    for position in range(50):
        link.send(frame(position))
        await taker.until(position + 1)
        await asyncio.to_thread(until_it_waits, poller)
    assert taker.taken == [(1, position) for position in range(50)]
    assert taker.readers == {taker.ident}, "no other thread had a hand in it"
    await taker.end()
    link.send(frame(50))  # nobody takes, but the loop reads again: a frame for an inbox that is closed ends its link
    assert "stopping" in (await two.next_lost())[1] and "stopping" in (await one.next_lost())[1]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_frames_stream_in_while_the_reading_thread_changes(
    alice: Identity, bob: Identity, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Some frames come while the taker waits, others while it works, large ones between; from two senders' threads."""

    async def stream() -> None:
        planes = [DataPlane(identity, ["127.0.0.1"], 0) for identity in (alice, bob)]
        for plane, other in zip(planes, (bob, alice), strict=True):
            await plane.start()
            await plane.set_trusted([other.certificate_pem])
        turns = 0

        def work() -> None:  # every other time long enough for the loop to have its turn
            nonlocal turns
            turns += 1
            if turns % 2:
                sum(range(turns % 7 * 2000))

        taker = Taker(planes[1].poller, work)
        links = []
        for stage in (1, 2):
            planes[1].expect(alice.device, Inlet(STEP, replace(LIMITS, stage=stage), taker.deliver))
            links.append(
                await planes[0].connect(
                    bob.device, bob.certificate_pem, ["127.0.0.1"], planes[1].port, DEPLOYMENT, 3, stage
                )
            )
        count = 400

        def send(link: Link) -> None:
            for position in range(count):
                link.send(frame(position, 200 if position % 13 == 0 else 1, link.stage))

        await asyncio.gather(*(asyncio.to_thread(send, link) for link in links))
        await taker.until(2 * count)
        for stage in (1, 2):
            assert [position for at, position in taker.taken if at == stage] == list(range(count))
        assert len(taker.taken) == 2 * count
        await taker.end()
        for plane in planes:
            await plane.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(stream())


async def test_small_frames_keep_their_place_behind_large_ones(nodes: list[Node]) -> None:
    """The loop writes the rest of a large frame while its sender goes on sending."""
    one, two, _ = nodes
    taker = Taker(two.plane.poller)
    expect(two, one, taker)
    link = await connect(one, two)
    count = 120

    def send() -> None:
        for position in range(count):
            link.send(frame(position, 256 if position % 5 == 0 else 1))  # 256 KiB: four times what goes directly

    await asyncio.to_thread(send)
    await taker.until(count)
    assert taker.taken == [(1, position) for position in range(count)]
    await taker.end()


async def test_the_plane_closes_under_a_thread_that_reads(nodes: list[Node]) -> None:
    one, two, _ = nodes
    taker = Taker(two.plane.poller)
    expect(two, one, taker)
    link = await connect(one, two)
    link.send(frame(1))
    await taker.until(1)
    await two.plane.close()
    assert (await one.next_lost())[0] == two.identity.device
    taker.inbox.put((9, 9))  # it goes on without the links
    await taker.until(2)
    await taker.end()


async def test_links_end_under_a_thread_that_reads(nodes: list[Node]) -> None:
    one, two, three = nodes
    taker = Taker(two.plane.poller)
    expect(two, one, taker)
    expect(two, three, taker, stage=2)
    bad, good = await connect(one, two), await connect(three, two, stage=2)
    bad.send(frame(1))
    await taker.until(1)
    bad.send(activation(epoch=4))
    assert "another epoch" in (await two.next_lost())[1]
    assert "another epoch" in (await one.next_lost())[1]
    again = await connect(one, two)
    again.send(frame(2))
    await taker.until(2)
    await two.plane.set_trusted([three.identity.certificate_pem])
    assert (await two.next_lost())[1] == "the device was removed from the household"
    good.send(frame(3, stage=2))
    await taker.until(3)
    good.close()
    await asyncio.wait_for(good.wait_closed(), WAIT_S)
    assert taker.taken == [(1, 1), (1, 2), (2, 3)] and two.lost.empty()
    await taker.end()


async def test_many_links_at_once(nodes: list[Node]) -> None:
    one, two, _ = nodes
    taker = Taker(two.plane.poller)
    stages = range(80)  # more than one look at the sockets tells of
    for stage in stages:
        expect(two, one, taker, stage)
    links = [await connect(one, two, stage) for stage in stages]
    for position in range(5):
        for link in links:
            link.send(frame(position, stage=link.stage))
    await taker.until(5 * len(stages))
    for stage in stages:
        assert [position for at, position in taker.taken if at == stage] == list(range(5))
    await taker.end()


@pytest.fixture
async def poller() -> Iterator[SharedPoller]:
    made = SharedPoller(asyncio.get_running_loop())
    yield made  # type: ignore[misc]
    made.close()
    made.close()


async def test_a_put_is_never_slept_through(poller: SharedPoller) -> None:
    """Thousands of single events, each put the moment the last was taken."""
    inbox: Inbox[int] = Inbox()
    inbox.poller = poller
    taken: SimpleQueue[int] = SimpleQueue()

    def take() -> None:
        while (events := inbox.take(wait=True)) is not None:
            for event in events:
                taken.put(event)

    def put() -> None:
        for number in range(3000):
            inbox.put(number)
            assert taken.get(timeout=WAIT_S) == number
        inbox.close()

    thread = threading.Thread(target=take)
    thread.start()
    await asyncio.to_thread(put)
    await asyncio.to_thread(thread.join, WAIT_S)
    assert not thread.is_alive()


async def test_one_thread_waits(poller: SharedPoller) -> None:
    poller.wait(lambda: False)  # there is something to do already
    going = True
    thread = threading.Thread(target=poller.wait, args=(lambda: going,))
    thread.start()
    await asyncio.to_thread(until_it_waits, poller)
    poller.wait(lambda: True)  # another one waits: it does not wait here
    going = False
    poller.wake()
    await asyncio.to_thread(thread.join, WAIT_S)
    assert not thread.is_alive()
    poller.close()
    poller.wait(lambda: True)
    poller.wake()


async def test_without_epoll_the_loop_reads(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, _ = nodes
    assert two.plane.poller is not None
    two.plane.poller.close()
    two.plane.poller, two.plane._poller = None, Poller(asyncio.get_running_loop())
    taker = Taker(None)
    expect(two, one, taker)
    link = await connect(one, two)
    for position in range(30):
        await asyncio.to_thread(link.send, frame(position, 1 + position * 8))
    await taker.until(30)
    assert taker.taken == [(1, position) for position in range(30)]
    assert taker.readers == {threading.get_ident()}
    await one.plane.close()
    assert (await two.next_lost())[0] == one.identity.device
    with pytest.raises(LinkError):
        link.send(frame(1))
    await taker.end()


async def test_a_thread_that_never_waits_leaves_no_sender_without_an_answer(nodes: list[Node]) -> None:
    """A PING comes with a frame that keeps the thread at work: its answer, and each sign of life, still go."""
    one, two, _ = nodes
    go_on = threading.Event()
    taker = Taker(two.plane.poller, work=lambda: go_on.wait(WAIT_S))
    expect(two, one, taker)
    timed: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
    link = await connect(one, two, timed=timed)
    async with asyncio.timeout(WAIT_S):
        await asyncio.to_thread(until_it_waits, two.plane.poller)
        while not link.timer.wanted:
            await timed.get()
        link.send(frame(0))
        await taker.until(1)
        while (await timed.get())[0] == 0:
            pass
    assert not go_on.is_set() and not link.closed
    go_on.set()
    await taker.end()
