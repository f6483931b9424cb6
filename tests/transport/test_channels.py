"""Channels on one connection: bounds of their own, credit, and that a full one stops neither another nor its sender."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest

from peerllm.engine.process.inbox import Inbox
from peerllm.errors import FrameError, LinkError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.limits import FrameLimits
from peerllm.transport.links import link as link_module
from peerllm.transport.links import liveness
from peerllm.transport.links.channels import (
    CHANNEL_OF_KIND,
    CHANNELS,
    FRAME_COST_BYTES,
    KEY_VALUE,
    STEP,
    Delivery,
    Inlet,
    LinkChannel,
    Mailbox,
    grant_payload,
)
from peerllm.transport.links.link import Link
from peerllm.transport.links.outbox import MAX_SAID_BYTES, Outbox
from peerllm.transport.websocket.framing import BINARY, PING, PONG, control, head
from tests.transport.frames_support import encode
from tests.transport.planes import LIMITS, WAIT_S, Node, activation, connect, expect, link_of
from tests.transport.test_links_hostile import rest, upgraded
from tests.transport.test_poller import until_it_waits

KEY_VALUES = replace(LIMITS, kinds=(FrameKind.KEY_VALUE,))
COST = len(encode(activation(tokens=256))) + FRAME_COST_BYTES  # of the largest frame of a test
FULL = STEP.credit_bytes // COST  # frames that there is credit for
QUEUE = STEP.bound_bytes // COST  # frames that may wait behind those


def large(position: int, kind: FrameKind = FrameKind.ACTIVATION) -> Frame:
    return replace(activation(position, 256), kind=kind)


@pytest.fixture
def no_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is sent that could hide a lost wake-up."""
    monkeypatch.setattr(liveness, "BEAT_S", 1000.0)


@dataclass
class Kept:
    """Deliveries that nobody takes until told to."""

    came: asyncio.Queue[Delivery] = field(default_factory=asyncio.Queue)
    threads: set[int] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def deliver(self, delivery: Delivery) -> None:
        self.threads.add(threading.get_ident())
        self.loop.call_soon_threadsafe(self.came.put_nowait, delivery)

    async def next(self) -> Delivery:
        return await asyncio.wait_for(self.came.get(), WAIT_S)

    async def positions(self, count: int) -> list[int]:
        return [(await self.next()).frame.runs[0].position for _ in range(count)]


async def fill(link: Link, kept: Kept, kind: FrameKind = FrameKind.ACTIVATION, more: int = 3) -> list[Delivery]:
    """Send all that there is credit for, one frame after the other has come, then `more`, which wait."""
    got = []
    credit = CHANNEL_OF_KIND[kind].credit_bytes // COST
    for position in range(credit + more):
        link.send(large(position, kind))
        if position < credit:
            got.append(await kept.next())
    assert len(link._outbox) == more and not link.closed and kept.came.empty()
    return got


def inlets(node: Node, sender: Node, *of: tuple[LinkChannel, FrameLimits, Kept]) -> None:
    node.plane.expect(sender.identity.device, *(Inlet(channel, limits, kept.deliver) for channel, limits, kept in of))


def test_each_channel_is_declared_once() -> None:
    assert len({channel.number for channel in CHANNELS}) == len({channel.name for channel in CHANNELS}) == len(CHANNELS)
    assert CHANNEL_OF_KIND.keys() == set(FrameKind), "each kind of frame goes on one channel"
    assert sum(len(channel.kinds) for channel in CHANNELS) == len(FrameKind)


async def test_an_inlet_takes_its_channels_kinds_only() -> None:
    with pytest.raises(ValueError, match="key-value"):
        Inlet(KEY_VALUE, LIMITS, lambda delivery: None)


# ---- between real sockets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [STEP, KEY_VALUE])
async def test_a_full_channel_does_not_stop_another(nodes: list[Node], no_beats: None, full: LinkChannel) -> None:
    """The one has neither credit nor, at last, room to queue; the other goes on over the same connection."""
    one, two, _ = nodes
    stuck, goes_on = Kept(), Kept()
    of_step, of_values = (stuck, goes_on) if full is STEP else (goes_on, stuck)
    inlets(two, one, (STEP, LIMITS, of_step), (KEY_VALUE, KEY_VALUES, of_values))
    link = await connect(one, two)
    kinds = (FrameKind.ACTIVATION, FrameKind.KEY_VALUE)
    stuck_kind, other_kind = kinds if full is STEP else kinds[::-1]
    got = await fill(link, stuck, stuck_kind, more=10)
    for position in range(5):
        link.send(replace(activation(position), kind=other_kind))
        other = await goes_on.next()
        assert other.frame.kind is other_kind and other.frame.runs[0].position == position
    assert len(link._outbox) == 10 and stuck.came.empty(), "the rest has no credit"
    for delivery in got:
        delivery.taken()
    for position in range(len(got), len(got) + 10):
        delivery = await stuck.next()
        assert delivery.frame.runs[0].position == position
        delivery.taken()
    assert not link.closed and one.lost.empty() and two.lost.empty()


async def test_one_deployments_full_queue_does_not_stop_anothers(nodes: list[Node], no_beats: None) -> None:
    """One thread sends to both, as the compute thread does; the first one's receiver takes nothing."""
    one, two, three = nodes
    stuck = Kept()
    inlets(two, one, (STEP, LIMITS, stuck))
    expect(three, one)
    full, free = await connect(one, two), await connect(one, three)

    def compute() -> str:
        reason = ""
        for position in range(FULL + 2 * QUEUE):
            with suppress(LinkError):
                full.send(large(position))
            if full.closed and not reason:
                with pytest.raises(LinkError) as caught:
                    full.send(large(position))
                reason = str(caught.value)
            if position % 50 == 0:
                free.send(activation(position))
        return reason

    computing = asyncio.create_task(asyncio.to_thread(compute))
    for position in range(0, FULL + 2 * QUEUE, 50):
        assert (await three.next_frame()).runs[0].position == position
    ended = await asyncio.wait_for(computing, WAIT_S)
    assert "frames wait on channel step, which is all that may" in ended
    device, reason = await one.next_lost()
    assert device == two.identity.device and "all that may" in reason
    assert "all that may" in (await two.next_lost())[1], "the other side hears why"
    assert not free.closed


async def test_a_vanished_receiver_ends_a_link_that_waits_for_credit(nodes: list[Node], no_beats: None) -> None:
    one, two, _ = nodes
    stuck = Kept()
    inlets(two, one, (STEP, LIMITS, stuck))
    link = await connect(one, two)
    await fill(link, stuck)
    await two.plane.close()
    assert (await one.next_lost())[0] == two.identity.device
    with pytest.raises(LinkError, match="the data plane is closed"):
        link.send(activation())
    assert len(link._outbox) == 0


async def test_what_waits_for_credit_still_goes_when_a_link_is_closed(nodes: list[Node], no_beats: None) -> None:
    one, two, _ = nodes
    stuck = Kept()
    inlets(two, one, (STEP, LIMITS, stuck))
    link = await connect(one, two)
    got = await fill(link, stuck)
    link.close()
    for delivery in got:
        delivery.taken()
    assert await stuck.positions(3) == [FULL, FULL + 1, FULL + 2]
    await asyncio.wait_for(link.wait_closed(), WAIT_S)
    assert not link.lost and one.lost.empty() and two.lost.empty()


async def test_a_close_does_not_wait_for_credit_of_a_receiver_that_vanished(
    nodes: list[Node], no_beats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FLUSH_TIMEOUT_S", 1000.0)
    one, two, _ = nodes
    stuck = Kept()
    inlets(two, one, (STEP, LIMITS, stuck))
    link = await connect(one, two)
    await fill(link, stuck)
    link.close()
    await two.plane.close()
    await asyncio.wait_for(link.wait_closed(), WAIT_S)
    assert not link.lost, "it was closed on purpose"


async def test_a_loss_is_told_at_once_in_the_middle_of_a_frame(
    nodes: list[Node], no_beats: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other side does not even read any more, so what was begun cannot be ended."""
    monkeypatch.setattr(link_module, "FLUSH_TIMEOUT_S", 1000.0)
    one, two, _ = nodes
    inlets(two, one, (STEP, LIMITS, Kept()))
    link = await connect(one, two)
    (accepted,) = two.plane._accepted.values()
    two.plane._poller.remove(accepted._connection.fd)
    for position in range(QUEUE):  # more than the system's buffers hold
        link.send(large(position))
    async with asyncio.timeout(WAIT_S):
        while select.select([], [link._connection.fd], [], 0)[1]:  # noqa: ASYNC110 - the loop writes meanwhile
            await asyncio.sleep(0)
    assert link._outbox.busy
    link.abort("gone")
    assert await one.next_lost() == (two.identity.device, "gone")


async def test_a_sender_beyond_its_credit_is_cut(nodes: list[Node]) -> None:
    one, two, _ = nodes
    stuck = Kept()
    inlets(two, one, (STEP, LIMITS, stuck))
    data = encode(large(1))
    async with upgraded(one, two) as (reader, writer):
        hearing = asyncio.create_task(rest(reader))
        for _ in range(FULL):
            writer.write(head(BINARY, len(data), masked=True) + data)
            await writer.drain()
        assert len(await stuck.positions(FULL)) == FULL and two.lost.empty()
        writer.write(head(BINARY, len(data), masked=True) + data)
        assert (await two.next_lost())[1] == f"more than its credit of {STEP.credit_bytes} bytes on channel step"
        assert b"more than its credit" in await hearing
    assert stuck.came.empty()


@pytest.mark.parametrize(
    "said",
    [
        grant_payload(STEP, 1),  # nothing was sent
        grant_payload(STEP, 2**64 - 1),
        grant_payload(replace(STEP, number=99), 0),
        grant_payload(STEP, 0)[:5] + b"\0\0\1" + bytes(8),
        b"PLGR" + bytes(4),
        b"PLGR",
        b"PLFR" + bytes(36),  # a frame, where none is taken in
    ],
)
async def test_a_receiver_that_grants_what_was_not_sent_is_cut(nodes: list[Node], said: bytes) -> None:
    one, two, _ = nodes
    inlets(two, one, (STEP, LIMITS, Kept()))
    link = await connect(one, two)
    (accepted,) = two.plane._accepted.values()
    accepted._outbox.say(BINARY, said)
    device, reason = await one.next_lost()
    assert device == two.identity.device and ("grant of credit" in reason or "out of turn" in reason)
    assert (await two.next_lost())[1] == reason
    assert link.closed


async def test_a_grant_never_takes_credit_back(nodes: list[Node]) -> None:
    one, two, _ = nodes
    kept = Kept()
    inlets(two, one, (STEP, LIMITS, kept))
    link = await connect(one, two)
    link.send(large(0))
    cost = (await kept.next()).cost_bytes
    (accepted,) = two.plane._accepted.values()
    for taken_bytes in (cost, cost, cost - 1):
        accepted._outbox.say(BINARY, grant_payload(STEP, taken_bytes))
    assert "grant of credit" in (await one.next_lost())[1]
    assert link._outbox._lanes[STEP].taken_bytes == cost, "said twice is no fault, less than before is"


async def test_each_channels_reader_gets_its_frames(nodes: list[Node]) -> None:
    """The thread that waits for frames reads all; what is for the loop is handed on, in order."""
    one, two, _ = nodes
    steps, values, inbox = Kept(), Kept(), Inbox[object]()
    inbox.poller = two.plane.poller
    thread = threading.Thread(target=lambda: [None for _ in iter(lambda: inbox.take(wait=True), None)])
    thread.start()
    inlets(two, one, (STEP, LIMITS, steps), (KEY_VALUE, KEY_VALUES, values))
    link = await connect(one, two)
    if inbox.poller is not None:
        await asyncio.to_thread(until_it_waits, inbox.poller)
    for position in range(20):
        link.send(activation(position))
        link.send(replace(activation(position), kind=FrameKind.KEY_VALUE))
    assert await steps.positions(20) == await values.positions(20) == list(range(20))
    assert values.threads == {threading.get_ident()}
    if inbox.poller is not None:
        assert thread.ident in steps.threads
    inbox.close()
    await asyncio.to_thread(thread.join, WAIT_S)


async def test_what_raises_on_the_loop_ends_the_link(nodes: list[Node]) -> None:
    one, two, _ = nodes

    def deliver(delivery: Delivery) -> None:
        raise FrameError("no keys of this model")

    two.plane.expect(one.identity.device, Inlet(KEY_VALUE, KEY_VALUES, deliver))
    link = await connect(one, two)
    link.send(replace(activation(), kind=FrameKind.KEY_VALUE))
    assert (await two.next_lost())[1] == (await one.next_lost())[1] == "no keys of this model"


async def test_a_channel_that_is_not_taken_in_here_ends_the_link(nodes: list[Node]) -> None:
    one, two, _ = nodes
    expect(two, one)
    link = await connect(one, two)
    link.send(replace(activation(), kind=FrameKind.KEY_VALUE))
    assert "of a kind not allowed here" in (await two.next_lost())[1]


async def test_frames_go_both_ways_over_one_connection(nodes: list[Node]) -> None:
    """As partial sums will: whoever was dialled sends, too, and whoever dialled takes in."""
    one, two, _ = nodes
    back, there = Kept(), Kept()
    inlets(two, one, (STEP, LIMITS, there))
    link = await connect(one, two, inlets=(Inlet(STEP, LIMITS, back.deliver),))
    link.send(activation(1))
    delivery = await there.next()
    for answer in await fill(link_of(delivery), back):
        answer.taken()
    assert await back.positions(3) == [FULL, FULL + 1, FULL + 2]
    if (poller := one.plane.poller) is not None:
        ended = threading.Event()
        thread = threading.Thread(target=lambda: poller.wait(lambda: not ended.is_set()))
        thread.start()
        await asyncio.to_thread(until_it_waits, poller)
        link_of(delivery).send(activation(9))
        assert await back.positions(1) == [9]
        ended.set()
        poller.wake()
        await asyncio.to_thread(thread.join, WAIT_S)
        assert thread.ident in back.threads, "who waits for frames reads them at the dialling end, too"


# ---- the two ends of a channel --------------------------------------------------------------------------------------


def channel(credit_bytes: int, bound_bytes: int = 0) -> LinkChannel:
    return replace(STEP, credit_bytes=credit_bytes, bound_bytes=bound_bytes)


def mailbox(credit_bytes: int, largest: int = 0) -> Mailbox:
    limits = replace(LIMITS, max_bytes=largest) if largest else LIMITS
    return Mailbox(Inlet(channel(credit_bytes), limits, lambda delivery: None))


def test_a_mailbox_holds_its_credit_and_no_more() -> None:
    box = mailbox(1000)
    box.add(400)
    box.add(600)
    with pytest.raises(FrameError, match="credit of 1000 bytes on channel step"):
        box.add(1)
    assert box.take(400) == 400
    box.add(400)
    with pytest.raises(FrameError):
        box.add(1)


def test_a_frame_larger_than_the_credit_goes_alone() -> None:
    box = mailbox(1000)
    box.add(5000)
    with pytest.raises(FrameError):
        box.add(1)
    assert box.take(5000) == 5000
    box.add(1)
    with pytest.raises(FrameError):
        box.add(5000)


@pytest.mark.parametrize("largest", [1, 300, 500, 700, 999, 1000, 5000])
def test_once_all_is_taken_the_largest_frame_has_room(largest: int) -> None:
    """Otherwise the sender would wait for a word that never comes; and half of the credit is told in one word."""
    box = mailbox(1000 + FRAME_COST_BYTES, largest)
    credit, told, taken, words = 1000 + FRAME_COST_BYTES, 0, 0, 0
    for cost in [1, 7, 300, 499, 500, 1] * 20:
        box.add(cost)
        taken += cost
        if (word := box.take(cost)) is not None:
            assert word == taken
            told, words = word, words + 1
        untold = taken - told
        assert not untold or untold + largest + FRAME_COST_BYTES <= credit
    assert words <= 120


def test_credit_is_given_back_in_few_words() -> None:
    box = mailbox(1 << 30)
    words = 0
    for _ in range(1000):
        box.add(1 << 20)
        words += box.take(1 << 20) is not None
    assert words == 1000 // 513


def test_half_of_the_credit_is_given_back_without_a_word() -> None:
    box = mailbox(1 << 30)
    for cost, word in ((1 << 29, None), (1, (1 << 29) + 1), (1 << 29, None), (1, (1 << 30) + 2)):
        box.add(cost)
        assert box.take(cost) == word


@dataclass
class Pipe:
    """A connection that takes records only while there is room for them."""

    fd: int
    room: int = 0
    written: list[bytes] = field(default_factory=list)

    def write(self, record: memoryview | bytes) -> bool:
        if self.room <= 0:
            return False
        self.room -= 1
        self.written.append(bytes(record))
        return True


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """Its descriptor says all the time that there is room."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Pipe(ours.fileno())


def outbox(pipe: Pipe, *channels: LinkChannel, broke: Callable[[str], None] = lambda reason: None) -> Outbox:
    return Outbox(pipe, asyncio.get_running_loop(), False, broke=broke, channels=channels)


async def test_a_full_queue_refuses_at_once_and_ends(pipe: Pipe) -> None:
    broke: asyncio.Queue[str] = asyncio.Queue()
    of = channel(1 << 30, 2 * FRAME_COST_BYTES + 10)
    box = outbox(pipe, of, broke=broke.put_nowait)
    box.put(of, 100, b"under way")
    box.put(of, 6, b"one")
    box.put(of, 4, b"two")
    assert len(box) == 2 and not box.ended
    with pytest.raises(LinkError, match="2 frames wait on channel step"):
        box.put(of, 0, b"three")
    assert len(box) == 0 and "2 frames wait" in await asyncio.wait_for(broke.get(), WAIT_S)
    with pytest.raises(LinkError, match="has ended: 2 frames wait"):
        box.put(of, 0, b"four")
    box.detach()


async def test_a_frame_larger_than_the_queue_waits_alone(pipe: Pipe) -> None:
    of = channel(1 << 30, 10)
    box = outbox(pipe, of)
    box.put(of, 100, b"under way")
    box.put(of, 100, b"alone")
    with pytest.raises(LinkError, match="1 frames wait"):
        box.put(of, 1, b"one more")
    box.detach()


async def test_what_waits_goes_in_the_channels_order(pipe: Pipe) -> None:
    first, second = channel(1 << 30, 1 << 30), replace(channel(1 << 30, 1 << 30), name="later")
    box = outbox(pipe, first, second)
    box.put(second, 1, b"under way")
    box.put(second, 1, b"later")
    box.put(first, 1, b"sooner")
    box.put(first, 1, b"sooner too")
    box.grant(second, 1)
    box.grant(second, 7)
    box.say(PING, b"ping")
    pipe.room = 10
    box.end("closed")
    await asyncio.wait_for(box.flushed(), WAIT_S)
    granted = control(BINARY, grant_payload(second, 7), False)
    assert pipe.written == [b"under way", control(PING, b"ping", False), granted, b"sooner", b"sooner too", b"later"]
    box.detach()


async def test_what_is_said_between_frames_is_bounded(pipe: Pipe) -> None:
    of = channel(1 << 30, 1 << 30)
    box = outbox(pipe, of)
    box.put(of, 1, b"under way")
    pong = control(PONG, bytes(8), False)
    for _ in range(1000):
        box.say(PONG, bytes(8))
    pipe.room = 100
    box.end("closed")
    await asyncio.wait_for(box.flushed(), WAIT_S)
    assert pipe.written == [b"under way", pong * (MAX_SAID_BYTES // len(pong))]
    box.detach()


async def test_credit_is_counted_to_the_byte(pipe: Pipe) -> None:
    of = channel(2 * (FRAME_COST_BYTES + 5), 1 << 30)
    box = outbox(pipe, of)
    pipe.room = 100
    cost = FRAME_COST_BYTES + 5
    box.put(of, 5, b"a")
    box.put(of, 5, b"b")
    box.put(of, 5, b"c")
    assert pipe.written == [b"a", b"b"] and len(box) == 1 and not box.busy
    assert not box.leaves_at_once(of, 0)
    assert box.credit(of, cost - 1)
    assert pipe.written == [b"a", b"b"]
    assert box.credit(of, cost)
    assert pipe.written == [b"a", b"b", b"c"]
    assert box.credit(of, cost), "said twice is no fault"
    assert not box.credit(of, cost - 1) and not box.credit(of, 3 * cost + 1)
    assert box.credit(of, 3 * cost) and box.leaves_at_once(of, 1 << 40), "with nothing on the way, any frame goes"
    box.detach()


async def test_a_flush_ends_with_the_last_frame_whoever_writes_it(pipe: Pipe) -> None:
    """The loop sleeps while the thread that reads a grant writes what had waited for it."""
    of = channel(FRAME_COST_BYTES, 1 << 30)
    box = outbox(pipe, of)
    pipe.room = 100
    for frame in (b"a", b"b", b"c"):
        box.put(of, 0, frame)
    box.end("closed")
    flushing = asyncio.create_task(box.flushed())
    for taken in (1, 2):
        await asyncio.sleep(0)
        assert not flushing.done()
        assert await asyncio.to_thread(box.credit, of, taken * FRAME_COST_BYTES)
    await asyncio.wait_for(flushing, WAIT_S)
    assert pipe.written == [b"a", b"b", b"c"]
    box.detach()


async def test_a_flush_ends_when_what_waits_is_discarded(pipe: Pipe) -> None:
    of = channel(FRAME_COST_BYTES, 1 << 30)
    box = outbox(pipe, of)
    pipe.room = 100
    box.put(of, 0, b"a")
    box.put(of, 0, b"b")
    box.end("closed")
    flushing = asyncio.create_task(box.flushed())
    await asyncio.sleep(0)
    box.end("over", discard=True)
    await asyncio.wait_for(flushing, WAIT_S)
    assert box.ended == "closed" and pipe.written == [b"a"]
    box.grant(of, 5)
    assert pipe.written == [b"a"], "nothing more is said of a link that has ended"
    box.detach()


async def test_a_connection_that_breaks_ends_its_outbox(pipe: Pipe) -> None:
    broke: asyncio.Queue[str] = asyncio.Queue()
    of = channel(1 << 30, 1 << 30)
    box = outbox(pipe, of, broke=broke.put_nowait)

    def broken(record: memoryview | bytes) -> bool:
        raise ConnectionError("reset")

    pipe.write = broken  # type: ignore[method-assign]
    with pytest.raises(LinkError, match="has ended: cannot send: reset"):
        box.put(of, 1, b"a")
    assert await asyncio.wait_for(broke.get(), WAIT_S) == "cannot send: reset"
    await asyncio.wait_for(box.flushed(), WAIT_S)
