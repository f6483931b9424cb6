"""This machine's network interfaces: where mDNS is spoken, and at which addresses others reach this device."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import ifaddr
import psutil

MAX_ADDRESSES = 16  # per device
LOCAL_PROBE = ("192.0.2.1", 9)  # documentation address (RFC 5737): a UDP socket "connects" without sending


@dataclass(frozen=True, slots=True)
class Interfaces:
    """What to open sockets on (`bind`, for zeroconf) and what to tell others (`addresses`)."""

    bind: tuple[str | int, ...]
    addresses: tuple[str, ...]


def interfaces(only: Sequence[str] | None = None) -> Interfaces:
    """The interfaces that are up, loopback only where there is nothing else; `only` names their addresses instead.

    OSError if the machine has no address at all.
    """
    if only is not None:
        return Interfaces(tuple(only), tuple(only))
    try:
        adapters = list(ifaddr.get_adapters())
    except OSError:  # Android denies it
        address = local_address()
        return Interfaces((address,), (address,))
    up = _up()
    found: dict[str, str | int] = {}
    loopback: dict[str, str | int] = {}
    for adapter in adapters:
        if up is not None and adapter.name not in up:
            continue
        for ip in adapter.ips:
            address = ip.ip if isinstance(ip.ip, str) else ip.ip[0].partition("%")[0]
            bind = address if isinstance(ip.ip, str) else adapter.index
            if bind is None:
                continue
            (loopback if ip_address(address).is_loopback else found)[address] = bind
    found = found or loopback
    if not found:
        raise OSError("no network interface is up")
    used = _used()  # a bridge of containers has an address too, but nobody else reaches that
    addresses = tuple(sorted(found, key=lambda address: (address != used, rank(address))))[:MAX_ADDRESSES]
    return Interfaces(tuple(dict.fromkeys(found[a] for a in addresses)), addresses)


def local_address() -> str:
    """The address this machine would send from, without looking at its interfaces. OSError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(LOCAL_PROBE)
        return str(probe.getsockname()[0])


def _used() -> str:
    """The address this machine would send from, "" where it has no way out."""
    try:
        return local_address()
    except OSError:
        return ""


def _up() -> set[str] | None:
    """Names of the interfaces that are up; None where that cannot be known."""
    try:
        return {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    except (OSError, RuntimeError):
        return None


def dialable(address: str) -> bool:
    """Whether another device can be dialled at what it advertises."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    # A link-local IPv6 address says nothing without the interface it was heard on.
    zoned = not (ip.version == 6 and ip.is_link_local) or "%" in address
    return not ip.is_multicast and not ip.is_unspecified and zoned


def rank(address: str) -> tuple[int, str]:
    """IPv4 first, link-local and loopback addresses last."""
    ip = ip_address(address)
    return (4 * ip.is_loopback + 2 * ip.is_link_local + (ip.version == 6), address)
