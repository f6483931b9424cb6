"""Reaching a device at any of its addresses: staggered attempts, the first that works wins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp

from peerllm.errors import AuthenticationError, LinkError, in_words
from peerllm.transport.dial import dial
from peerllm.transport.identity import Identity
from peerllm.transport.tls.contexts import client_context, peer_device
from peerllm.types import DeviceId

STAGGER_S = 0.2  # head start of each address over the next
ATTEMPT_TIMEOUT_S = 4.0
WHO_TIMEOUT_S = 4.0  # for an address of which it is not known whose it is


async def dial_first(
    session: aiohttp.ClientSession,
    identity: Identity,
    device: DeviceId,
    certificate_pem: str,
    hosts: tuple[str, ...],
    port: int,
    path: str,
    max_message_bytes: int,
) -> tuple[aiohttp.ClientWebSocketResponse, str]:
    """A websocket to the device and the address it was reached at. LinkError or AuthenticationError if none works."""

    async def attempt(place: int, host: str) -> tuple[aiohttp.ClientWebSocketResponse, str]:
        await asyncio.sleep(place * STAGGER_S)
        websocket = await dial(
            session,
            identity,
            device,
            certificate_pem,
            host,
            port,
            path,
            max_message_bytes=max_message_bytes,
            timeout_s=ATTEMPT_TIMEOUT_S,
        )
        return websocket, host

    waiting = {
        asyncio.create_task(attempt(place, host), name=f"dial-{device[:8]}-{place}") for place, host in enumerate(hosts)
    }
    tasks = set(waiting)
    failures: list[LinkError | AuthenticationError] = []
    won: tuple[aiohttp.ClientWebSocketResponse, str] | None = None
    try:
        while waiting and won is None:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    won = won or task.result()
                except (LinkError, AuthenticationError) as error:
                    failures.append(error)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and task.exception() is None and (won is None or task.result() is not won):
                await task.result()[0].close()
    if won is not None:
        return won
    # A device that answers but will not let this one in says more than an address where nobody is.
    failures.sort(key=lambda failure: isinstance(failure, LinkError))
    raise failures[0] if failures else LinkError(f"{device[:8]} has no known address")


async def who_answers(identity: Identity, pems: Iterable[str], host: str, port: int) -> DeviceId:
    """Which device of the household listens at an address. LinkError if nobody, or nobody of the household."""
    context = client_context(identity, "\n".join(pem.strip() for pem in pems))
    try:
        async with asyncio.timeout(WHO_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except TimeoutError as error:
        raise LinkError(f"{host}:{port} did not answer within {WHO_TIMEOUT_S:g} s") from error
    except (OSError, ValueError) as error:  # a TLS refusal is an OSError, an impossible host name a ValueError
        raise LinkError(f"{host}:{port} cannot be used: {in_words(error)}") from error
    try:
        return peer_device(writer.transport)
    except AuthenticationError as error:
        raise LinkError(f"{host}:{port} hung up: it is not of this household") from error
    finally:
        writer.transport.abort()
