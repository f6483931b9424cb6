"""What a deployment's decider knows: the household's devices, the running plan, and the one thing that is under way."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from peerllm.daemon.decide.deployment_life.deployment_events import DeviceCondition, DeviceIs
from peerllm.types import DeviceId, Stage

GO_ON_S = 1.0  # after it was told to be silent, and so after two seconds of silence, a device is not waited for ...
DISTRUST_FIRST_S = 10.0  # a device that was lost twice is not moved to for so long, doubling with each loss ...
DISTRUST_MOST_S = 300.0  # ... up to this
FORGIVEN_S = 600.0  # a loss counts for so long
MAX_LOSSES = 16  # of one device that are remembered

# start: nothing is loaded. loss: the running plan lost a device, or may have. leave: a device asks to hold nothing.
# gain: another plan may be better.
Why = Literal["start", "loss", "leave", "gain"]


# ---- what is under way: one of these ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing is under way."""


@dataclass(frozen=True, slots=True)
class Planning:
    """A plan is searched. `because`: devices of the running plan that were not online when that began."""

    number: int
    why: Why
    because: frozenset[DeviceId]
    careful: bool  # it does without devices that failed or were lost of late, too


@dataclass(frozen=True, slots=True)
class PlanInHand:
    """A plan is found, and waits until it is sure that it is needed."""

    number: int
    why: Why
    because: frozenset[DeviceId]
    stages: tuple[Stage, ...]
    beside: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Establishing:
    """Devices load and link the plan. `renewal`: it is the running plan once more."""

    epoch: int
    why: Why
    because: frozenset[DeviceId]
    stages: tuple[Stage, ...]
    renewal: bool = False


@dataclass(frozen=True, slots=True)
class Carrying:
    """The plan stands; the state of running sequences is copied to it while they are computed in the running one."""

    epoch: int
    why: Why
    because: frozenset[DeviceId]
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class BackingOff:
    """An attempt failed; the next begins then."""

    until: float
    why: Why


@dataclass(frozen=True, slots=True)
class Ended:
    """The deployment is given up."""


UnderWay = Idle | Planning | PlanInHand | Establishing | Carrying | BackingOff | Ended


# ---- the running plan ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RunningPlan:
    """The plan that sequences are computed in, or wait in. What is not said to be lost is loaded."""

    epoch: int
    stages: tuple[Stage, ...]
    since: float
    replaces: bool  # earlier epochs stand until it is switched to
    switching: bool = True
    links_lost: str = ""  # why its links must be made anew
    renewed: bool = False  # a device of it is reached over another connection, so its links may be lost
    doubtful: str = ""  # why a device of it may have lost what it had loaded
    engines_lost: dict[DeviceId, str] = field(default_factory=dict)  # why, by device

    @property
    def links_doubted(self) -> bool:
        return self.renewed or bool(self.links_lost or self.doubtful)

    @property
    def devices(self) -> frozenset[DeviceId]:
        return frozenset(stage.device for stage in self.stages)


# ---- the devices --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _DeviceFacts:
    condition: DeviceCondition
    since: float
    reason: str
    lost: bool = False  # this absence counts as a loss
    left_out: bool = False  # a plan was searched without it


class HouseholdDevices:
    """The devices' conditions, and how often each was lost of late. One that nothing was said of is online."""

    def __init__(self, me: DeviceId) -> None:
        self._me = me
        self._known: dict[DeviceId, _DeviceFacts] = {}
        self._losses: dict[DeviceId, list[float]] = {}

    def note(self, event: DeviceIs, now: float) -> bool:
        """Whether it can be used anew: it is new, or is online again and was lost, failed, left or was left out."""
        before = self._known.get(event.device)
        if before is not None and before.condition == event.condition and not before.lost:
            before.reason = event.reason or before.reason
            return False
        reason = event.reason or f"{event.device[:8]} is {event.condition}"
        absent = before is not None and event.condition != "online"
        lost, left_out = (before.lost, before.left_out) if before is not None and absent else (False, False)
        self._known[event.device] = _DeviceFacts(event.condition, now, reason, lost, left_out)
        if event.condition in ("gone", "leaving") and before is not None:
            self.lose(event.device, now)
        joined = before is None or before.lost or before.left_out or before.condition == "gone"
        return event.condition == "online" and joined

    def lose(self, device: DeviceId, now: float) -> None:
        """It was lost to this deployment; until it is online again that counts once."""
        known = self._known.get(device)
        if known is None or not known.lost:
            self.fail(device, now)

    def fail(self, device: DeviceId, now: float) -> None:
        """It lost what it had loaded."""
        times = [then for then in self._losses.get(device, []) if now - then < FORGIVEN_S]
        self._losses[device] = [*times[1 - MAX_LOSSES :], now]
        self._known.setdefault(device, _DeviceFacts("online", now, "")).lost = True

    def leave_out(self, devices: Collection[DeviceId]) -> None:
        """A plan is searched without them."""
        for device in self.of(devices, "silent", "gone", "leaving"):
            self._known[device].left_out = True

    def of(self, devices: Collection[DeviceId], *conditions: DeviceCondition) -> frozenset[DeviceId]:
        """Those in one of the conditions."""
        return frozenset(d for d in devices if (known := self._known.get(d)) and known.condition in conditions)

    def unusable(self) -> frozenset[DeviceId]:
        """All that no plan may use; this device itself is never one of them."""
        return self.of(self._known, "silent", "gone", "leaving") - {self._me}

    def given_up(self, devices: Collection[DeviceId], now: float) -> frozenset[DeviceId]:
        """Those that are gone, or silent for too long to wait for them."""
        late = {d for d in self.of(devices, "silent") if now >= self.silent_until(d)}
        return self.of(devices, "gone") | late

    def silent_until(self, device: DeviceId) -> float:
        """Until when a silent device is waited for."""
        return self._known[device].since + GO_ON_S

    def reason(self, device: DeviceId) -> str:
        return self._known[device].reason

    def distrusted_until(self, device: DeviceId) -> float:
        """Until when no plan moves to a device that was lost again and again."""
        losses = self._losses.get(device, [])
        if len(losses) < 2:
            return 0.0
        return losses[-1] + min(DISTRUST_MOST_S, DISTRUST_FIRST_S * 2.0 ** (len(losses) - 2))

    def distrusted(self, now: float) -> frozenset[DeviceId]:
        return frozenset(device for device in self._losses if now < self.distrusted_until(device))
