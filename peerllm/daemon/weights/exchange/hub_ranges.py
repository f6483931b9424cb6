"""Byte ranges of files on the Hugging Face hub, at the address that is this device's own setting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from peerllm.daemon.control_messages import HubFiles
from peerllm.errors import LinkError, NotFoundError, UnavailableError

CONNECT_TIMEOUT_S = 15.0
STALL_TIMEOUT_S = 30.0  # without a byte
CHUNK_BYTES = 256 << 10


class HubRanges:
    """`token`: of this device's owner, None for what another device asks for: it would get what only the owner may."""

    def __init__(self, hub: HubFiles, token: str | None) -> None:
        self._hub, self._token = hub, token
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, file: int, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Exactly `length` bytes from `offset` on. LinkError if the connection breaks; NotFoundError."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=STALL_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, middlewares=(by_proxy,))
        name = self._hub.files[file]
        url = hf_hub_url(self._hub.model, name, revision=self._hub.commit)
        headers = build_hf_headers(token=self._token or False)
        headers |= {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        got = 0
        try:
            async with self._session.get(url, headers=headers) as response:
                _check(response.status, self._hub.model, name)
                async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                    part = chunk[: length - got]
                    got += len(part)
                    yield part
                    if len(part) < len(chunk):
                        break
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, LinkError):
                raise
            raise LinkError(f"the Hugging Face hub cannot be reached: {error or type(error).__name__}") from error
        if got != length:
            raise LinkError(f"the hub ended {name} after {got} of {length} bytes")


async def by_proxy(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Go by the environment's proxy, wherever a redirect leads. `trust_env` would also send what `.netrc` holds."""
    if (proxy := await asyncio.to_thread(_proxy_of, request.url)) is not None:
        login = {}
        if proxy.user is not None:
            login["Proxy-Authorization"] = aiohttp.encode_basic_auth(proxy.user, proxy.password or "")
        request.update_proxy(proxy.with_user(None), None, login if request.is_ssl() else None)
        if not request.is_ssl():
            request.headers.update(login)
    return await handler(request)


def _proxy_of(url: URL) -> URL | None:
    proxy = getproxies().get(url.scheme)
    return URL(proxy) if proxy and url.host is not None and not proxy_bypass(url.host) else None


def _check(status: int, model: str, name: str) -> None:
    if status in (401, 403, 404, 416):
        raise NotFoundError(f"the hub does not give {name} of {model} (HTTP {status})")
    if status == 200:
        raise NotFoundError(f"the hub gives no parts of {name}")
    if status != 206:
        raise UnavailableError(f"the hub answers HTTP {status} for {name} of {model}")
