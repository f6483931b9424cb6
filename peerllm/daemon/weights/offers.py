"""The source's side of fetching weights: serves byte ranges of its deployments' tensors, which are named by hash."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiofiles
import aiofiles.os
from aiohttp import web

from peerllm.engine.messages import TensorAt
from peerllm.types import DeploymentId

ROUTE = "/weights/{deployment}/{sha256}"
BLOCK_BYTES = 1 << 20
MAX_TRANSFERS = 16  # tensors sent at once; more wait their turn
STALL_TIMEOUT_S = 30.0  # a device that takes not a block for so long gives up its turn


def offer_path(deployment: DeploymentId, sha256: str) -> str:
    """The path of a tensor on the source's control port."""
    return f"/weights/{deployment}/{sha256}"


class Offers:
    """The tensors that members may fetch from this device now. No request can name anything else of its disk."""

    def __init__(self) -> None:
        self._offers: dict[DeploymentId, dict[str, TensorAt]] = {}
        self._turns = asyncio.Semaphore(MAX_TRANSFERS)

    def offer(self, deployment: DeploymentId, tensors: Mapping[str, TensorAt]) -> None:
        """`tensors` by SHA-256; replaces what was offered for this deployment."""
        self._offers[deployment] = dict(tensors)

    def withdraw(self, deployment: DeploymentId) -> None:
        self._offers.pop(deployment, None)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """GET with an optional Range of one part; the listener has already proved that a member asks."""
        tensors = self._offers.get(request.match_info["deployment"], {})
        tensor = tensors.get(request.match_info["sha256"])
        if tensor is None:
            raise web.HTTPNotFound(text="no such tensor is offered")
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
        async with self._turns:
            await self._send(request, response, tensor, start, stop)
        return response

    @staticmethod
    async def _send(
        request: web.Request, response: web.StreamResponse, tensor: TensorAt, start: int, stop: int
    ) -> None:
        if not await aiofiles.os.path.isfile(tensor.path):
            raise web.HTTPGone(text="the source's file is gone")
        async with aiofiles.open(tensor.path, "rb") as file:
            await file.seek(tensor.offset + start)
            await response.prepare(request)
            while start < stop:
                block = await file.read(min(BLOCK_BYTES, stop - start))
                if not block:  # the file was cut short: end early, the other side counts
                    return
                try:
                    async with asyncio.timeout(STALL_TIMEOUT_S):
                        await response.write(block)
                except TimeoutError:  # it resumes later; others wait for their turn
                    if request.transport is not None:
                        request.transport.abort()
                    return
                start += len(block)
        await response.write_eof()
