"""Dialling one device: a websocket over mutual TLS, pinned to its certificate."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp
from yarl import URL

from peerllm.codec import MAX_MESSAGE_BYTES
from peerllm.errors import AuthenticationError, LinkError
from peerllm.transport.identity import Identity
from peerllm.transport.timeouts import CLOSE_TIMEOUT_S, DIAL_TIMEOUT_S
from peerllm.transport.tls.contexts import client_context, peer_device
from peerllm.types import DeviceId


def dialling_session(limit: int = 0) -> aiohttp.ClientSession:
    """The session to dial with: `limit` connections at once (0: any number), no proxies, no cookies, no redirects."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(_refuse_redirect,),
        trust_env=False,
    )


async def _refuse_redirect(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Followed, a redirect would make this device send a request to any address of the other's choice."""
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise aiohttp.ClientConnectionError("it tries to send this device elsewhere")
    return response


async def dial(
    session: aiohttp.ClientSession,
    identity: Identity,
    device: DeviceId,
    certificate_pem: str,
    host: str,
    port: int,
    path: str,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    timeout_s: float = DIAL_TIMEOUT_S,
) -> aiohttp.ClientWebSocketResponse:
    """A websocket to `device` and nobody else. AuthenticationError: another answered; LinkError: no link came up.

    `session` is a `dialling_session`. Addresses come from other devices: an impossible one is a LinkError as well.
    """
    where = f"{device[:8]} at {host}:{port}"
    try:
        url = URL.build(scheme="wss", host=host, port=port, path=path)
        async with asyncio.timeout(timeout_s):
            websocket = await session.ws_connect(
                url,
                ssl=client_context(identity, certificate_pem),
                max_msg_size=max_message_bytes + 1,  # aiohttp refuses what reaches the limit
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
            )
    except TimeoutError as error:
        raise LinkError(f"{where} did not answer within {timeout_s:g} s") from error
    except aiohttp.WSServerHandshakeError as error:
        if error.status == 403:
            raise AuthenticationError(f"{where} does not let this device in there") from error
        raise LinkError(f"{where} declined {path} (HTTP {error.status})") from error
    except aiohttp.ServerDisconnectedError as error:
        raise LinkError(f"{where} hung up: it does not know this device (any more), or is going down") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if _is_tls(error):
            raise AuthenticationError(f"{where} is another device, or no longer knows this one") from error
        # aiohttp's own text ends with the TLS context's address in memory.
        why = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        raise LinkError(f"{where} cannot be reached: {why}") from error
    try:
        found = peer_device(websocket)
    except AuthenticationError as error:  # the connection is gone already
        raise LinkError(f"{where} hung up at once") from error
    if found != device:
        await websocket.close()
        raise AuthenticationError(f"{where} turned out to be {found[:8]}")
    return websocket


def _is_tls(error: BaseException | None) -> bool:
    """Whether a TLS refusal stands anywhere among the error's causes."""
    while error is not None:
        if isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
