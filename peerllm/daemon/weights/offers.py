"""What other devices may fetch from here: any tensor of the store, and of the files that were hashed, by SHA-256."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import BinaryIO, Protocol
from weakref import WeakValueDictionary

from aiohttp import web

from peerllm.daemon.control_messages import Answer, Have
from peerllm.daemon.decide.hub_places import SHA256
from peerllm.daemon.weights.exchange.holders import answer
from peerllm.engine.messages import TensorAt
from peerllm.regular_files import open_regular
from peerllm.transport.tls.contexts import peer_device
from peerllm.types import DeviceId

BLOCK_BYTES = 1 << 20
MAX_TRANSFERS = 16  # tensors sent at once; more wait their turn ...
MAX_TRANSFERS_OF_DEVICE = 4  # ... as they do of one device, which may read as slowly as it likes; it asks for no more
STALL_TIMEOUT_S = 30.0  # a device that takes not a block for so long gives up its turn


class OwnTensors(Protocol):
    """Tensors of this disk by SHA-256."""

    def find(self, sha256: str) -> TensorAt | None: ...


class KeptTensors(OwnTensors, Protocol):
    """Those of the store, which knows places on the hub too (holders.TensorStock)."""

    def held(self, key: str) -> str: ...

    def coming(self, key: str) -> bool: ...


class Offers:
    """Serves byte ranges to members of the household. No request can name anything else of the disk."""

    def __init__(
        self, kept: KeptTensors, own: OwnTensors, who: Callable[[web.Request], DeviceId] = peer_device
    ) -> None:
        """`who`: the device that asks."""
        self._kept, self._own, self._who = kept, own, who
        self._turns = asyncio.Semaphore(MAX_TRANSFERS)
        self._lines: WeakValueDictionary[DeviceId, asyncio.Semaphore] = WeakValueDictionary()

    def held(self, key: str) -> str:
        return self._kept.held(key) or (key if self._own.find(key) is not None else "")

    def coming(self, key: str) -> bool:
        return self._kept.coming(key)

    def answer(self, question: Have) -> Answer:
        return answer(self, question)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET with an optional Range of one part; the listener has already proved that a member asks."""
        sha256 = request.match_info["sha256"]
        tensor = (self._kept.find(sha256) or self._own.find(sha256)) if SHA256.fullmatch(sha256) else None
        if tensor is None:
            raise web.HTTPNotFound(text="no such tensor is here")
        try:
            asked = request.http_range
        except ValueError:
            raise web.HTTPBadRequest(text="one range of bytes, please") from None
        start, stop, _ = asked.indices(tensor.nbytes)
        if start >= stop and tensor.nbytes:
            raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{tensor.nbytes}"})
        partial = asked.start is not None or asked.stop is not None
        response = web.StreamResponse(status=206 if partial else 200)
        response.content_type = "application/octet-stream"
        response.content_length = stop - start
        if partial:
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{tensor.nbytes}"
        line = self._lines.setdefault(self._who(request), asyncio.Semaphore(MAX_TRANSFERS_OF_DEVICE))
        async with line, self._turns:
            try:
                file = await asyncio.to_thread(open_regular, tensor.path)
            except OSError:
                raise web.HTTPNotFound(text="the file is gone") from None
            try:
                await self._send(request, response, file, tensor.offset + start, stop - start)
            finally:
                await asyncio.to_thread(file.close)
        return response

    @staticmethod
    async def _send(
        request: web.Request, response: web.StreamResponse, file: BinaryIO, offset: int, length: int
    ) -> None:
        file.seek(offset)
        await response.prepare(request)
        while length > 0:
            block = await asyncio.to_thread(file.read, min(BLOCK_BYTES, length))
            if not block:  # the file was cut short: end early, the other side counts
                return
            try:
                async with asyncio.timeout(STALL_TIMEOUT_S):
                    await response.write(block)
            except TimeoutError:  # it resumes later; others wait for their turn
                if request.transport is not None:
                    request.transport.abort()
                return
            length -= len(block)
        await response.write_eof()
