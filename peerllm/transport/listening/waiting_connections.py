"""Which connections wait for something from their other end, and which of them has to make way. Sans-I/O."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Generic, TypeVar

MOST_WAITING = 128  # connections of one kind that wait at one port
LEAST_WAITING = 8
DESCRIPTOR_SHARE = 16  # ... but no more than this part of the descriptors that this process may have

C = TypeVar("C", bound=Hashable)


def most_waiting(times: int = 1) -> int:
    """How many connections may wait at a port, by how many descriptors this process may have.

    `times` as many at a port where hundreds may come in one instant and mean well.
    """
    if sys.platform == "win32":
        return times * MOST_WAITING
    import resource

    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:
        return times * MOST_WAITING
    return times * max(LEAST_WAITING, min(MOST_WAITING, descriptors // DESCRIPTOR_SHARE))


def share_of(host: str) -> str:
    """What shares one part of a port: an address; of IPv6, where a machine has as many as it likes, its network."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else str(ip_network((address, 64), strict=False))
    return str(address)


class WaitingConnections(Generic[C]):
    """At most `most` at once. One more, and the oldest of the address that has most has to go.

    Who means well is done within milliseconds, and a flood from one address pushes out its own.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._shares: dict[C, str] = {}
        self._waiting: dict[str, dict[C, None]] = {}  # by share, the oldest first

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[C]:
        return iter(list(self._shares))

    def add(self, connection: C, host: str) -> C | None:
        """From now on it waits, as the newest; returns the one that has to make way and waits no more."""
        self.discard(connection)
        share = share_of(host)
        self._shares[connection] = share
        self._waiting.setdefault(share, {})[connection] = None
        return self.make_way() if len(self._shares) > self._most else None

    def discard(self, connection: C) -> None:
        """It does not wait any more. Idempotent."""
        if (share := self._shares.pop(connection, None)) is not None:
            del self._waiting[share][connection]
            if not self._waiting[share]:
                del self._waiting[share]

    def make_way(self) -> C | None:
        """The one that has to go, which waits no more; None if there is none."""
        if not self._waiting:
            return None
        crowd = max(self._waiting.values(), key=len)
        connection = next(iter(crowd))
        self.discard(connection)
        return connection
