"""Bytes from another device over pinned mutual TLS: ranges for weights, and the probe that measures bandwidth."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web
from yarl import URL

from peerllm.errors import LinkError, NotFoundError, RefusedError
from peerllm.transport.identity import Identity
from peerllm.transport.tls import client_context
from peerllm.types import DeviceId

MAX_PROBE_BYTES = 4 << 20
FIRST_PROBE_BYTES = 256 << 10
FAST_PROBE_S = 0.1  # a first probe quicker than this says too little; the larger one follows
PROBE_TIMEOUT_S = 30.0
CHUNK_BYTES = 256 << 10
CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 10.0  # without a byte
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_DEVICE = 4
MAX_CONTEXTS = 128

_probing = web.AppKey("probing", asyncio.Lock)


def add_probe(app: web.Application) -> None:
    """Serve GET /probe/{nbytes}: so many zero bytes, one request at a time."""
    app[_probing] = asyncio.Lock()
    app.router.add_get("/probe/{nbytes}", _serve_probe)


async def _serve_probe(request: web.Request) -> web.StreamResponse:
    text = request.match_info["nbytes"]
    if not text.isascii() or not text.isdigit() or len(text) > 8 or int(text) > MAX_PROBE_BYTES:
        raise web.HTTPBadRequest(text=f"at most {MAX_PROBE_BYTES} bytes")
    left = int(text)
    response = web.StreamResponse(headers={"Content-Length": text})
    async with request.app[_probing]:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await response.prepare(request)
                zeros = bytes(CHUNK_BYTES)
                while left > 0:
                    part = memoryview(zeros)[: min(left, CHUNK_BYTES)]
                    await response.write(part)
                    left -= len(part)
                await response.write_eof()
        except TimeoutError:  # others wait for their turn
            if request.transport is not None:
                request.transport.abort()
    return response


class Bulk:
    """Plain HTTP requests to devices of the household; `close` when done."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[str, ssl.SSLContext] = {}  # by certificate, so that connections are used again

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, limit_per_host=MAX_CONNECTIONS_PER_DEVICE)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, trust_env=False, auto_decompress=False
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def get(
        self, device: DeviceId, certificate_pem: str, host: str, port: int, path: str, offset: int, length: int
    ) -> AsyncIterator[bytes]:
        """Exactly `length` bytes of `path` from `offset` on, in chunks. LinkError if the link breaks or lies."""
        assert self._session is not None
        if length <= 0:
            return
        where = f"{path} of {device[:8]}"
        url = URL.build(scheme="https", host=host, port=port, path=path)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        got = 0
        try:
            async with self._session.get(
                url, ssl=self._context(certificate_pem), headers=headers, allow_redirects=False
            ) as response:
                _check(response, device, where, partial=offset > 0)
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    got += len(chunk)
                    if got > length:
                        raise LinkError(f"{where} is longer than asked for")
                    yield chunk
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, LinkError):
                raise
            raise LinkError(f"{where} broke off after {got} bytes: {error or type(error).__name__}") from error
        if got != length:
            raise LinkError(f"{where} ended after {got} of {length} bytes")

    def _context(self, certificate_pem: str) -> ssl.SSLContext:
        if certificate_pem not in self._contexts:
            while len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[certificate_pem] = client_context(self._identity, certificate_pem)
        return self._contexts[certificate_pem]

    async def measure_mbps(self, device: DeviceId, certificate_pem: str, host: str, port: int) -> float:
        """Megabits per second from that device to this one. LinkError if it cannot be measured."""
        mbps, seconds = await self._probe(device, certificate_pem, host, port, FIRST_PROBE_BYTES)
        if seconds < FAST_PROBE_S:
            mbps, _ = await self._probe(device, certificate_pem, host, port, MAX_PROBE_BYTES)
        return mbps

    async def _probe(
        self, device: DeviceId, certificate_pem: str, host: str, port: int, nbytes: int
    ) -> tuple[float, float]:
        got, first, start, end = 0, 0, 0.0, 0.0
        asked = time.perf_counter()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                async for chunk in self.get(device, certificate_pem, host, port, f"/probe/{nbytes}", 0, nbytes):
                    end = time.perf_counter()
                    got += len(chunk)
                    if not first:  # connecting and asking are latency, not bandwidth
                        first, start = len(chunk), end
        except TimeoutError as error:
            raise LinkError(f"measuring the link to {device[:8]} took over {PROBE_TIMEOUT_S:g} s") from error
        if got == first:  # all of it came at once
            start, first = asked, 0
        seconds = max(end - start, 1e-6)
        return (got - first) * 8 / 1e6 / seconds, seconds


def _check(response: aiohttp.ClientResponse, device: DeviceId, where: str, partial: bool) -> None:
    if response.status in (404, 416):
        raise NotFoundError(f"{device[:8]} does not have {where.split(' of ', maxsplit=1)[0]}")
    if response.status == 403:
        raise RefusedError(f"{device[:8]} does not give {where.split(' of ', maxsplit=1)[0]} to this device")
    if response.status not in ((206,) if partial else (200, 206)):
        raise LinkError(f"{where} was answered with HTTP {response.status}")
