"""Data planes between real sockets, and what goes over their links."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.identity import Identity
from peerllm.transport.links.channels import STEP, Delivery, Inlet
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link

DEPLOYMENT = "ab" * 16
WAIT_S = 10.0
WIDTH = 256
LIMITS = FrameLimits(
    deployment=DEPLOYMENT,
    epoch=3,
    stage=1,
    kinds=(FrameKind.ACTIVATION,),
    max_runs=4,
    slots=8,
    context=1 << 20,
    max_tokens=256,
    tensors={"hidden": TensorLimit(("F32",), 2, last_dim=WIDTH, per_token=True, required=True)},
)


def link_of(delivery: Delivery) -> Link:
    """The link that a frame came in on."""
    inbound = delivery.give_back.__self__  # type: ignore[attr-defined]
    link = inbound._hear.__self__
    assert isinstance(link, Link)
    return link


def activation(position: int = 0, tokens: int = 1, epoch: int = 3) -> Frame:
    data = NamedTensor.of("hidden", "F32", (tokens, WIDTH), bytes([position % 256]) * (tokens * WIDTH * 4))
    return Frame(FrameKind.ACTIVATION, DEPLOYMENT, epoch, 1, (TokenRun(9, 0, position, tokens),), (data,))


@dataclass
class Node:
    """A device's data plane and what it heard."""

    identity: Identity
    plane: DataPlane
    lost: asyncio.Queue[tuple[str, str, str]] = field(default_factory=asyncio.Queue)
    frames: asyncio.Queue[tuple[str, Frame]] = field(default_factory=asyncio.Queue)

    async def next_lost(self) -> tuple[str, str]:
        deployment, device, reason = await asyncio.wait_for(self.lost.get(), WAIT_S)
        assert deployment == DEPLOYMENT
        return device, reason

    async def next_frame(self) -> Frame:
        return (await asyncio.wait_for(self.frames.get(), WAIT_S))[1]


def expect(node: Node, sender: Node, limits: FrameLimits = LIMITS) -> None:
    def deliver(delivery: Delivery) -> None:
        delivery.taken()
        node.frames.put_nowait((link_of(delivery).device, delivery.frame))

    node.plane.expect(sender.identity.device, Inlet(STEP, limits, deliver))


async def connect(
    sender: Node,
    receiver: Node,
    stage: int = 1,
    hosts: tuple[str, ...] = ("127.0.0.1",),
    timed: asyncio.Queue[tuple[int, float]] | None = None,
    inlets: tuple[Inlet, ...] = (),
) -> Link:
    """`timed` gets how long frames took: (bytes, seconds); `inlets` are what the dialling end takes in."""
    who, port = receiver.identity, receiver.plane.port
    heard = None if timed is None else (lambda nbytes, seconds: timed.put_nowait((nbytes, seconds)))
    at = (who.device, who.certificate_pem, hosts, port)
    return await sender.plane.connect(*at, DEPLOYMENT, 3, stage, heard, inlets=inlets)
