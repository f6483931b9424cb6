"""How fast bytes come from another device: it sends zeros, and the first of them are timed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from aiohttp import web

from peerllm.errors import LinkError
from peerllm.types import DeviceId

MAX_PROBE_BYTES = 4 << 20
FIRST_PROBE_BYTES = 32 << 10
FAST_PROBE_S = 0.05  # a probe quicker than this says too little; a larger one follows ...
PROBE_GROWTH = 16  # ... by this at most, and of no more than the link carries in PROBE_AIR_S
PROBE_AIR_S = 0.4  # the longest that probes may keep a link, all together; what has come by then counts
LEAST_AIR_S = 0.05
PROBE_TIMEOUT_S = 10.0  # until the first byte, and for the side that serves in all
BLOCK_BYTES = 256 << 10  # written at a time

Get = Callable[[DeviceId, str, int, int], AsyncGenerator[bytes, None]]  # of a device a path, from an offset, so many

_probing = web.AppKey("probing", asyncio.Lock)
_free: web.AppKey[Callable[[], bool]] = web.AppKey("free")


def add_probe(app: web.Application, may_be_probed: Callable[[], bool]) -> None:
    """Serve GET /probe/{nbytes}: so many zero bytes, one request at a time, while nothing else goes on here."""
    app[_probing] = asyncio.Lock()
    app[_free] = may_be_probed
    app.router.add_get("/probe/{nbytes}", _serve_probe)


async def _serve_probe(request: web.Request) -> web.StreamResponse:
    text = request.match_info["nbytes"]
    if not text.isascii() or not text.isdigit() or len(text) > 8 or int(text) > MAX_PROBE_BYTES:
        raise web.HTTPBadRequest(text=f"at most {MAX_PROBE_BYTES} bytes")
    if request.app[_probing].locked() or not request.app[_free]():
        raise web.HTTPServiceUnavailable(text="this device is busy; ask again later")
    left = int(text)
    response = web.StreamResponse(headers={"Content-Length": text})
    async with request.app[_probing]:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await response.prepare(request)
                zeros = bytes(BLOCK_BYTES)
                while left > 0:
                    part = memoryview(zeros)[: min(left, BLOCK_BYTES)]
                    await response.write(part)
                    left -= len(part)
                await response.write_eof()
        except TimeoutError:  # others wait for their turn
            if request.transport is not None:
                request.transport.abort()
    return response


class BandwidthProbe:
    """Measures what other devices serve at /probe; `get` downloads from them."""

    def __init__(self, get: Get) -> None:
        self._get = get

    async def measure_mbps(self, device: DeviceId) -> float:
        """Megabits per second from that device to this one. UnavailableError if it is busy, LinkError otherwise."""
        nbytes, left_s, best = FIRST_PROBE_BYTES, PROBE_AIR_S, 0.0
        again = True  # one slow probe may only show that a processor was busy
        while True:
            mbps, seconds = await self._probe(device, nbytes, left_s)
            left_s -= seconds
            best = mbps if again else max(best, mbps)  # a larger probe tells more than the smaller ones before
            larger = min(MAX_PROBE_BYTES, PROBE_GROWTH * nbytes, int(mbps * 125_000 * left_s))
            if seconds < FAST_PROBE_S and larger > nbytes:
                nbytes, again = larger, True
            elif again and left_s > LEAST_AIR_S:
                again = False
            else:
                return best

    async def _probe(self, device: DeviceId, nbytes: int, air_s: float) -> tuple[float, float]:
        """Megabits per second, and how long the bytes that say so took; at most `air_s`."""
        got, first, start, end = 0, 0, 0.0, 0.0
        asked = time.perf_counter()
        blocks = self._get(device, f"/probe/{nbytes}", 0, nbytes)
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S) as limit:
                async for chunk in blocks:
                    end = time.perf_counter()
                    got += len(chunk)
                    if not first:  # connecting and asking are latency, not bandwidth
                        first, start = len(chunk), end
                        limit.reschedule(asyncio.get_running_loop().time() + air_s)
        except TimeoutError as error:
            if got == first:
                raise LinkError(f"measuring the link to {device[:8]} took too long") from error
            end = time.perf_counter()
        finally:
            await blocks.aclose()  # an unfinished answer's connection is closed
        if got == first:  # all of it came at once
            start, first = asked, 0
        seconds = max(end - start, 1e-6)
        return (got - first) * 8 / 1e6 / seconds, seconds
