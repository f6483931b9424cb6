"""Timing frames between two devices before any plan joins them: over a link of its own, through a link's real code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from peerllm.errors import LinkError
from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.link import Link

ECHO_PATH = "/echo"
NOBODY = "0" * 32  # no deployment's id: ids are random
MAX_ECHO_BYTES = 64 << 10  # of a frame's tensor
PINGS = 4  # alone, for the PONG's way
WARM_UPS = 2  # frames of each size that do not count: the first ones find cold caches and a small TCP window
ECHO_TIMEOUT_S = 3.0

ECHO_LIMITS = FrameLimits(
    deployment=NOBODY,
    epoch=0,
    stage=0,
    kinds=(FrameKind.ECHO,),
    max_runs=1,
    slots=1,
    context=1,
    max_tokens=1,
    tensors={"bytes": TensorLimit(("U8",), 1, max_elements=MAX_ECHO_BYTES, required=True)},
)

FrameTime = tuple[int, float]  # bytes, seconds of the way there


async def timed_frames(link: Link, results: asyncio.Queue[FrameTime], sizes: Sequence[int]) -> list[FrameTime]:
    """Send a frame of each size in turn, each after the one before has arrived. LinkError if that takes too long.

    `results` is what `link` tells its timings to. Frames are handed over by another thread, as a stage's are.
    """

    async def one(size: int) -> FrameTime:
        while True:
            link.timer.wanted = True
            await asyncio.to_thread(link.send, _frame(size))
            if (result := await results.get())[0]:  # else the link's own beat came between
                return result

    timed: list[FrameTime] = []
    previous = 0
    try:
        async with asyncio.timeout(ECHO_TIMEOUT_S):
            for _ in range(PINGS):
                link.beat()
                await results.get()
            for size in sizes:
                for _ in range(WARM_UPS if size != previous else 0):
                    await one(size)
                timed.append(await one(size))
                previous = size
    except TimeoutError as error:
        raise LinkError(f"timing the link to {link.device[:8]} took over {ECHO_TIMEOUT_S:g} s") from error
    return timed


def _frame(size: int) -> Frame:
    data = NamedTensor.of("bytes", "U8", (size,), bytes(size))
    return Frame(FrameKind.ECHO, NOBODY, 0, 0, (TokenRun(0, 0, 0, 1),), (data,))
