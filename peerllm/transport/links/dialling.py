"""Dialling one device's data plane: TCP, TLS pinned to its certificate, and the upgrade."""

from __future__ import annotations

import asyncio
import base64
import secrets
import socket
import ssl
from collections.abc import Iterable
from http import HTTPStatus

from peerllm.errors import AuthenticationError, LinkError, PeerLLMError
from peerllm.transport.identity import Identity
from peerllm.transport.links.connection import Connection, handshake, read_head
from peerllm.transport.timeouts import DIAL_TIMEOUT_S
from peerllm.transport.tls.contexts import client_context, peer_device
from peerllm.transport.websocket.upgrade import END, MAX_HEAD_BYTES, read_answer, request
from peerllm.types import DeviceId


async def dial_link(
    identity: Identity, device: DeviceId, certificate_pem: str, hosts: Iterable[str], port: int, path: str
) -> Connection:
    """A connection to `device` and nobody else, over the first of the addresses that works; they are tried in turn.

    AuthenticationError: another answered, or it does not let this device in; LinkError: no link came up.
    """
    failures: list[LinkError | AuthenticationError] = []
    for host in dict.fromkeys(hosts):  # the first is where the daemon's own link stands
        try:
            return await _dial(identity, device, certificate_pem, host, port, path)
        except (LinkError, AuthenticationError) as error:
            failures.append(error)
    raise failures[0] if failures else LinkError(f"no address is known of {device[:8]}")


async def _dial(
    identity: Identity, device: DeviceId, certificate_pem: str, host: str, port: int, path: str
) -> Connection:
    where = f"{device[:8]} at {host}:{port}"
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            plain = await _reach(host, port)
            return await _secure(plain, client_context(identity, certificate_pem), device, where, host, port, path)
    except TimeoutError as error:
        raise LinkError(f"{where} did not answer within {DIAL_TIMEOUT_S:g} s") from error
    except PeerLLMError:
        raise
    except (OSError, ValueError, OverflowError) as error:  # an address from another device may be an impossible one
        raise LinkError(f"{where} cannot be reached: {error}") from error


async def _reach(host: str, port: int) -> socket.socket:
    """A connected socket that does not block; OSError of the last address tried."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed: OSError = OSError("no such address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Of a link-local address uvloop resolves and connects without the scope, unless the host's text names it.
            await loop.sock_connect(sock, (host, port, 0, 0) if "%" in host else address)
        except OSError as error:
            sock.close()
            failed = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failed


async def _secure(
    plain: socket.socket, context: ssl.SSLContext, device: DeviceId, where: str, host: str, port: int, path: str
) -> Connection:
    sock: socket.socket = plain
    try:
        secure = sock = context.wrap_socket(plain, do_handshake_on_connect=False)
        try:
            await handshake(secure)
            if (found := peer_device(secure)) != device:
                raise AuthenticationError(f"{where} turned out to be {found[:8]}")
            key = base64.b64encode(secrets.token_bytes(16)).decode()
            secure.write(request(host, port, path, key))
            head = await read_head(secure, END, MAX_HEAD_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise AuthenticationError(f"{where} is another device, or no longer knows this one") from error
        except AuthenticationError:  # an OSError, too
            raise
        except OSError as error:  # in TLS 1.3 a refusal of our certificate comes with the first read
            raise LinkError(f"{where} hung up: it does not know this device (any more), or is going down") from error
        try:
            status = read_answer(head, key)
        except LinkError as error:
            raise LinkError(f"{where} cannot be reached: {error}") from error
        if status == HTTPStatus.FORBIDDEN:
            raise AuthenticationError(f"{where} does not let this device in there")
        if status != HTTPStatus.SWITCHING_PROTOCOLS:
            raise LinkError(f"{where} declined {path} (HTTP {status})")
    except BaseException:
        sock.close()
        raise
    return Connection(secure, device)
