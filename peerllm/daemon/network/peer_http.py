"""HTTP between devices over pinned mutual TLS: byte ranges for weights, the bandwidth probe, people's requests."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import web
from yarl import URL

from peerllm.daemon.facade import RelayedAnswer
from peerllm.errors import LinkError, NotFoundError, RefusedError, UnavailableError
from peerllm.transport.identity import Identity
from peerllm.transport.tls.contexts import client_context
from peerllm.types import DeviceId

MAX_PROBE_BYTES = 4 << 20
FIRST_PROBE_BYTES = 32 << 10
FAST_PROBE_S = 0.05  # a probe quicker than this says too little; a larger one follows ...
PROBE_GROWTH = 16  # ... by this at most, and of no more than the link carries in PROBE_AIR_S
PROBE_AIR_S = 0.4  # the longest that probes may keep a link, all together; what has come by then counts
LEAST_AIR_S = 0.05
PROBE_TIMEOUT_S = 10.0  # until the first byte, and for the side that serves in all
CHUNK_BYTES = 256 << 10
CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 10.0  # without a byte
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_DEVICE = 4
MAX_CONTEXTS = 128
MAX_RELAYED = 512  # answers of other devices under way at once; the API streams no more
UPLOAD_TIMEOUT_S = 40.0  # until the other device has taken a request's body; it waits less long for one itself
ANSWER_STALL_S = 100.0  # without a byte of an answer: it is heard of each 5 s, and a silent device is waited for 60 s

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


class PeerHttp:
    """HTTP requests to devices of the household; `start` it, `close` it when done."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._session: aiohttp.ClientSession | None = None
        self._relaying: aiohttp.ClientSession | None = None  # answers take long and must not keep downloads waiting
        self._contexts: dict[str, ssl.SSLContext] = {}  # by certificate, so that connections are used again

    async def start(self) -> None:
        connector = aiohttp.TCPConnector(limit=MAX_CONNECTIONS, limit_per_host=MAX_CONNECTIONS_PER_DEVICE)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, trust_env=False, auto_decompress=False
        )
        self._relaying = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_RELAYED),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_STALL_S),
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        for session in (self._session, self._relaying):
            if session is not None:
                await session.close()

    async def get(
        self, device: DeviceId, certificate_pem: str, host: str, port: int, path: str, offset: int, length: int
    ) -> AsyncGenerator[bytes, None]:
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
                try:
                    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                        got += len(chunk)
                        if got > length:
                            raise LinkError(f"{where} is longer than asked for")
                        yield chunk
                finally:
                    if got != length:  # an orderly end of TLS would first take all that is under way
                        _abort(response)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, LinkError):
                raise
            raise LinkError(f"{where} broke off after {got} bytes: {error or type(error).__name__}") from error
        if got != length:
            raise LinkError(f"{where} ended after {got} of {length} bytes")

    @asynccontextmanager
    async def post(
        self,
        device: DeviceId,
        certificate_pem: str,
        host: str,
        port: int,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
    ) -> AsyncIterator[RelayedAnswer]:
        """The answer to a POST, its body as it comes; it may take as long as it likes, but not without a sign of life.

        LinkError if the link breaks or stalls. An answer that is left before its end is cut off, so that the device
        stops at once.
        """
        assert self._relaying is not None
        url = URL.build(scheme="https", host=host, port=port, path=path)
        context = self._context(certificate_pem)
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S) as upload:
                response = await self._relaying.post(
                    url,
                    ssl=context,
                    headers={**headers, "Content-Length": str(len(body))},
                    data=_uploaded(body, upload),
                    allow_redirects=False,
                )
        except TimeoutError as error:
            raise LinkError("the device that answers for it says nothing") from error
        except (aiohttp.ClientError, OSError) as error:
            raise LinkError("the device that answers for it cannot be reached") from error
        try:
            yield RelayedAnswer(response.status, response.headers, _pieces(response))
        finally:
            if not response.content.at_eof():
                _abort(response)
            response.release()

    def _context(self, certificate_pem: str) -> ssl.SSLContext:
        if certificate_pem not in self._contexts:
            while len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[certificate_pem] = client_context(self._identity, certificate_pem)
        return self._contexts[certificate_pem]

    async def measure_mbps(self, device: DeviceId, certificate_pem: str, host: str, port: int) -> float:
        """Megabits per second from that device to this one. UnavailableError if it is busy, LinkError otherwise."""
        nbytes, left_s, best = FIRST_PROBE_BYTES, PROBE_AIR_S, 0.0
        again = True  # one slow probe may only show that a processor was busy
        while True:
            mbps, seconds = await self._probe(device, certificate_pem, host, port, nbytes, left_s)
            left_s -= seconds
            best = mbps if again else max(best, mbps)  # a larger probe tells more than the smaller ones before
            larger = min(MAX_PROBE_BYTES, PROBE_GROWTH * nbytes, int(mbps * 125_000 * left_s))
            if seconds < FAST_PROBE_S and larger > nbytes:
                nbytes, again = larger, True
            elif again and left_s > LEAST_AIR_S:
                again = False
            else:
                return best

    async def _probe(
        self, device: DeviceId, certificate_pem: str, host: str, port: int, nbytes: int, air_s: float
    ) -> tuple[float, float]:
        """Megabits per second, and how long the bytes that say so took; at most `air_s`."""
        got, first, start, end = 0, 0, 0.0, 0.0
        asked = time.perf_counter()
        blocks = self.get(device, certificate_pem, host, port, f"/probe/{nbytes}", 0, nbytes)
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


async def _uploaded(body: bytes, upload: asyncio.Timeout) -> AsyncGenerator[bytes, None]:
    """The body in pieces; once they are taken, the wait for the answer has a bound of its own."""
    for start in range(0, len(body), CHUNK_BYTES):
        yield body[start : start + CHUNK_BYTES]
    with suppress(RuntimeError):  # the answer came before its body was taken
        upload.reschedule(None)


async def _pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in response.content.iter_any():
            yield piece
    except (aiohttp.ClientError, OSError) as error:
        raise LinkError("the device that answered was lost") from error


def _abort(response: aiohttp.ClientResponse) -> None:
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()


def _check(response: aiohttp.ClientResponse, device: DeviceId, where: str, partial: bool) -> None:
    if response.status in (404, 416):
        raise NotFoundError(f"{device[:8]} does not have {where.split(' of ', maxsplit=1)[0]}")
    if response.status == 503:
        raise UnavailableError(f"{device[:8]} is busy")
    if response.status == 403:
        raise RefusedError(f"{device[:8]} does not give {where.split(' of ', maxsplit=1)[0]} to this device")
    if response.status not in ((206,) if partial else (200, 206)):
        raise LinkError(f"{where} was answered with HTTP {response.status}")
