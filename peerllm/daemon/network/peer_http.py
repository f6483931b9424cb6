"""HTTP between devices over pinned mutual TLS: byte ranges, and people's requests that it answers."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace
from yarl import URL

from peerllm.daemon.facade import RelayedAnswer
from peerllm.errors import LinkError, NotFoundError, RefusedError, UnavailableError
from peerllm.transport.identity import Identity
from peerllm.transport.tls.contexts import client_context
from peerllm.types import DeviceId

CHUNK_BYTES = 256 << 10
CONNECT_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 10.0  # without a byte
MAX_CONNECTIONS = 32
MAX_CONNECTIONS_PER_DEVICE = 4
MAX_CONTEXTS = 128
MAX_RELAYED = 512  # answers of other devices under way at once; the API streams no more
MAX_OPENING = 16  # connections for those that are opened at once: a port that is crowded cuts the oldest of the new
UPLOAD_TIMEOUT_S = 40.0  # until the other device has taken a request's body; it waits less long for one itself
ANSWER_STALL_S = 100.0  # without a byte of an answer: it is heard of each 5 s, and a silent device is waited for 60 s


@dataclass(frozen=True, slots=True)
class ControlPort:
    """Where a device of the household is reached, and what it has to prove."""

    host: str
    port: int
    certificate_pem: str


class _GentleConnector(aiohttp.TCPConnector):
    """Opens a few connections at a time, however many are asked for."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit=limit)
        self._opening = asyncio.Semaphore(MAX_OPENING)

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        async with self._opening:
            return await super()._create_connection(req, traces, timeout)


class PeerHttp:
    """Requests to devices of the household. `start` it, `close` it. `where` raises LinkError for one that is away."""

    def __init__(self, identity: Identity, where: Callable[[DeviceId], ControlPort]) -> None:
        self._identity, self._where = identity, where
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
            connector=_GentleConnector(limit=MAX_RELAYED),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_STALL_S),
            trust_env=False,
            auto_decompress=False,
        )

    async def close(self) -> None:
        for session in (self._session, self._relaying):
            if session is not None:
                await session.close()

    async def get(self, device: DeviceId, path: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Exactly `length` bytes of `path` from `offset` on, in chunks. LinkError if the link breaks or lies."""
        assert self._session is not None
        if length <= 0:
            return
        where = f"{path} of {device[:8]}"
        url, context = self._reached(device, path)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        got = 0
        try:
            async with self._session.get(url, ssl=context, headers=headers, allow_redirects=False) as response:
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
        self, device: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[RelayedAnswer]:
        """The answer to a POST, its body as it comes; it may take as long as it likes, but not without a sign of life.

        LinkError if the link breaks or stalls. An answer that is left before its end is cut off, so that the device
        stops at once.
        """
        assert self._relaying is not None
        url, context = self._reached(device, path)
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

    def _reached(self, device: DeviceId, path: str) -> tuple[URL, ssl.SSLContext]:
        at = self._where(device)
        if at.certificate_pem not in self._contexts:
            while len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.pop(next(iter(self._contexts)))
            self._contexts[at.certificate_pem] = client_context(self._identity, at.certificate_pem)
        return URL.build(scheme="https", host=at.host, port=at.port, path=path), self._contexts[at.certificate_pem]


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
