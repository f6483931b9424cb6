"""A device of the household as this one knows it."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.daemon.control_messages import DeviceView, Hello
from peerllm.daemon.decide.membership_events import State
from peerllm.types import DeviceId


@dataclass(frozen=True, slots=True)
class Peer:
    """Another device of the household, also when it is away; `hosts` begins with the address that works."""

    device: DeviceId
    name: str
    state: State
    hello: Hello | None = None
    view: DeviceView | None = None
    hosts: tuple[str, ...] = ()
    control_port: int = 0
    data_port: int = 0
    rtt_ms: float | None = None
    mbps: float | None = None  # from that device to this one
    problem: str = ""  # why it is not online, or cannot be used


@dataclass(frozen=True, slots=True)
class Sighting:
    """A device heard of by mDNS that is not of the household; nothing of this is proven."""

    short_id: str
    name: str
    addresses: tuple[str, ...]
    port: int
    protocol: int
    memory_bytes: int
    door: str
    pairing_port: int
