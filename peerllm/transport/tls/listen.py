"""Listening sockets: several addresses, IPv4 and IPv6, all on one port."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Iterable
from typing import Any

from peerllm.errors import BadInputError

BACKLOG = 64  # connections that wait to be accepted
MAX_PORT_DRAWS = 8  # how often a free port is drawn anew because another address has it taken
WILDCARDS = ("::", "0.0.0.0")  # noqa: S104 - compared with, not bound to
NO_SUCH_FAMILY = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT})


Address = tuple[int, tuple[Any, ...]]  # family, (host, 0), of IPv6 (host, 0, flow, scope)


async def listen(hosts: Iterable[str], port: int) -> list[socket.socket]:
    """Sockets listening on every host, all on one port (0: a free one). BadInputError says which port is in use.

    A wildcard address of a family this machine lacks is left out.
    """
    addresses = await _resolve(hosts)
    for _ in range(MAX_PORT_DRAWS):
        sockets: list[socket.socket] = []
        chosen = port
        try:
            for family, address in addresses:
                sock = _bind(family, address, chosen)
                if sock is not None:
                    sockets.append(sock)
                    chosen = sock.getsockname()[1]
        except OSError as error:
            for sock in sockets:
                sock.close()
            if error.errno == errno.EADDRINUSE and not port and sockets:
                continue
            raise _explained(error, chosen, addresses) from error
        if sockets:
            return sockets
        break
    raise BadInputError(f"none of {', '.join(address[0] for _, address in addresses)} can be listened on")


async def _resolve(hosts: Iterable[str]) -> list[Address]:
    """Those of each host, once each."""
    found: dict[Address, None] = {}
    for host in hosts:
        try:
            # Not the loop's own: uvloop's loses the scope of a link-local address.
            infos = await asyncio.to_thread(
                socket.getaddrinfo, host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise BadInputError(f"{host} is no address of this device") from error
        for family, _, _, _, address in infos:
            found[family, address] = None
    if not found:
        raise BadInputError("no address to listen on")
    return list(found)


def _bind(family: int, address: tuple[Any, ...], port: int) -> socket.socket | None:
    host, _, *scope = address
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in NO_SUCH_FAMILY:
            return None
        raise
    try:
        if sys.platform != "win32":  # there it would let two listeners share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port, *scope))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno in NO_SUCH_FAMILY and host in WILDCARDS:
            return None
        raise
    return sock


def _explained(error: OSError, port: int, addresses: list[Address]) -> BadInputError:
    where = ", ".join(address[0] for _, address in addresses)
    if error.errno == errno.EADDRINUSE:
        return BadInputError(f"port {port} is in use on {where}; choose another with --port N, which takes N to N + 2")
    if error.errno == errno.EACCES:
        return BadInputError(f"port {port} may not be opened by this user; choose one above 1023 with --port")
    return BadInputError(f"cannot listen on {where}, port {port}: {error.strerror}")
