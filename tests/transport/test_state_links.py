"""Links that bring a stage state: from several senders, beside the steps' link, no faster than it is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from peerllm.errors import LinkError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.links.channels import FRAME_COST_BYTES, KEY_VALUE, Inlet
from peerllm.transport.links.link import Link
from tests.transport.planes import DEPLOYMENT, LIMITS, WAIT_S, Node, activation, connect, expect
from tests.transport.test_channels import Kept

VALUES = replace(LIMITS, kinds=(FrameKind.KEY_VALUE,))


def values(position: int, tokens: int = 128) -> Frame:
    return replace(activation(position, tokens), kind=FrameKind.KEY_VALUE)


async def carry(sender: Node, receiver: Node, stage: int = 1) -> Link:
    who, port = receiver.identity, receiver.plane.port
    at = (who.device, who.certificate_pem, ("127.0.0.1",), port)
    return await sender.plane.connect(*at, DEPLOYMENT, 3, stage, carries=True)


def expect_values(receiver: Node, sender: Node) -> Kept:
    kept = Kept()
    receiver.plane.expect(sender.identity.device, Inlet(KEY_VALUE, VALUES, kept.deliver), carries=True)
    return kept


async def test_several_bring_state_beside_the_steps_and_nobody_hears_of_their_ends(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, one)
    of_one, of_three = expect_values(two, one), expect_values(two, three)
    steps, carried, other = await connect(one, two), await carry(one, two), await carry(three, two)
    for link, position in ((carried, 5), (other, 6), (steps, 7)):
        link.send(values(position) if link is not steps else activation(position))
    assert await of_one.positions(1) == [5] and await of_three.positions(1) == [6]
    assert (await two.next_frame()).runs[0].position == 7
    carried.abort("broken on purpose")
    other.close()
    await asyncio.gather(carried.wait_closed(), other.wait_closed())
    steps.send(activation(8))
    assert (await two.next_frame()).runs[0].position == 8
    assert two.lost.empty() and one.lost.empty() and three.lost.empty()
    again = await carry(one, two)
    again.send(values(9))
    assert await of_one.positions(1) == [9]
    await two.plane.forget(DEPLOYMENT)
    await again.wait_closed()
    with pytest.raises(LinkError, match="404"):
        await carry(one, two)


async def test_only_whom_the_plan_names_may_bring_state(nodes: list[Node]) -> None:
    one, two, three = nodes
    expect(two, three)
    expect_values(two, one)
    for sender, stage in ((three, 1), (one, 2)):
        with pytest.raises(LinkError, match="404"):
            await carry(sender, two, stage)
    with pytest.raises(PermissionError):
        await connect(one, two)
    link = await carry(one, two)
    link.send(activation())
    await link.wait_closed()
    assert "of a kind not allowed" in link.lost


async def test_a_bulk_sender_waits_for_what_is_taken(nodes: list[Node]) -> None:
    one, two, _ = nodes
    kept = expect_values(two, one)
    link = await carry(one, two)
    await asyncio.wait_for(link.drained(KEY_VALUE), WAIT_S)  # nothing was sent
    cost = 128 * 256 * 4 + FRAME_COST_BYTES
    there = KEY_VALUE.credit_bytes // cost
    for position in range(there + 2):
        link.send(values(position))
    got = [await kept.next() for _ in range(there)]
    waiting = asyncio.ensure_future(link.drained(KEY_VALUE))
    also = asyncio.ensure_future(link.drained(KEY_VALUE))
    await asyncio.sleep(0)
    assert not waiting.done() and kept.came.empty(), "more than the credit was sent"
    for delivery in got:
        delivery.taken()
    await asyncio.wait_for(asyncio.gather(waiting, also), WAIT_S)
    assert await kept.positions(2) == [there, there + 1]


@pytest.mark.parametrize("end", [lambda link: link.abort("gone"), lambda link: link.close()])
async def test_a_bulk_sender_hears_that_the_link_has_ended(nodes: list[Node], end: Callable[[Link], None]) -> None:
    one, two, _ = nodes
    expect_values(two, one)
    link = await carry(one, two)
    for position in range(8):
        link.send(values(position))
    waiting = asyncio.ensure_future(link.drained(KEY_VALUE))
    await asyncio.sleep(0)
    end(link)
    await asyncio.wait_for(waiting, WAIT_S)
    with pytest.raises(LinkError):
        link.send(values(9))
