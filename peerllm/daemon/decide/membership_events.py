"""What membership hears and what it wants done (decide/membership.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peerllm.types import DeviceId

State = Literal["connecting", "online", "silent", "offline", "left"]
LINKED: frozenset[State] = frozenset({"online", "silent"})  # a link to the device stands
Address = tuple[str, int]
Target = DeviceId | Address  # a device, or an address of which only TLS will say who it is


@dataclass(frozen=True, slots=True, order=True)
class LinkName:
    """A control link: who dialled it, and a number that the dialler gives it."""

    dialler: DeviceId
    number: int


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Members:
    """The roster's live devices but this one."""

    devices: frozenset[DeviceId]


@dataclass(frozen=True, slots=True)
class Sighted:
    """A device was heard of by mDNS or from disk; only the start of its id is known. `fresh`: it is there now."""

    prefix: str
    hosts: tuple[str, ...]
    port: int
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Up:
    """A link stands and both Hellos have passed; `target` is what was dialled, None for an accepted link."""

    link: LinkName
    device: DeviceId
    host: str
    port: int
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class DialFailed:
    target: Target
    reason: str


@dataclass(frozen=True, slots=True)
class Incompatible:
    """The device is there but cannot be used (another protocol version)."""

    device: DeviceId
    reason: str
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """A message came over a link."""

    link: LinkName


@dataclass(frozen=True, slots=True)
class HeartbeatHeard:
    """A heartbeat of the device came beside its link."""

    device: DeviceId


@dataclass(frozen=True, slots=True)
class Down:
    link: LinkName
    reason: str


@dataclass(frozen=True, slots=True)
class Farewell:
    """The device said goodbye on this link."""

    link: LinkName
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Members | Sighted | Up | DialFailed | Incompatible | Heard | HeartbeatHeard | Down | Farewell | Tick

# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    target: Target
    hosts: tuple[str, ...]
    port: int


@dataclass(frozen=True, slots=True)
class Use:
    """From now on send to the device over this link."""

    device: DeviceId
    link: LinkName


@dataclass(frozen=True, slots=True)
class Retire:
    """Send no more over this link; close it once the other side has had time to see the better one."""

    link: LinkName


@dataclass(frozen=True, slots=True)
class Cut:
    link: LinkName
    reason: str


@dataclass(frozen=True, slots=True)
class Beat:
    link: LinkName


@dataclass(frozen=True, slots=True)
class Changed:
    """A device's state or the reason for it changed, or (`renewed`) it is reached over another connection than before.

    What was sent over the connection before may be lost if the device was silent.
    """

    device: DeviceId
    before: State
    state: State
    reason: str
    renewed: bool = False


Action = Dial | Use | Retire | Cut | Beat | Changed
