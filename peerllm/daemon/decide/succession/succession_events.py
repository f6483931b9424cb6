"""What happens to deployments that other devices coordinate, and what a device is to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peerllm.types import DeploymentId, DeviceId

Presence = Literal["online", "silent", "gone"]


@dataclass(frozen=True, slots=True)
class CoordinatedPlan:
    """A deployment as its coordinator tells it: `devices` in the order of the plan, each once."""

    deployment: DeploymentId
    coordinator: DeviceId
    devices: tuple[DeviceId, ...]
    epoch: int
    serving: bool
    succeeds: DeploymentId = ""  # the deployment that this one was begun anew for
    stays: bool = False  # its coordinator gives way to no other that goes on with the same


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlanTold:
    """A coordinator, this device or another, told of a deployment."""

    plan: CoordinatedPlan


@dataclass(frozen=True, slots=True)
class ObeyedTold:
    """Another device says whom it has obeyed in the deployments that it has a part in (`Succession.obeyed`)."""

    device: DeviceId
    coordinators: Mapping[DeploymentId, DeviceId]


@dataclass(frozen=True, slots=True)
class DeploymentOver:
    """A device, this one or another, does not coordinate a deployment any more: nobody is to follow it there."""

    deployment: DeploymentId
    coordinator: DeviceId


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """Another device is heard, silent, or gone. `renewed`: over another connection, over which it tells all anew."""

    device: DeviceId
    presence: Presence
    renewed: bool = False


@dataclass(frozen=True, slots=True)
class Equipped:
    """This device now has (or no longer has) all that a source of the deployment needs."""

    deployment: DeploymentId
    complete: bool = True


@dataclass(frozen=True, slots=True)
class VoteAsked:
    """Another device asks for this device's vote."""

    candidate: DeviceId
    plan: CoordinatedPlan  # as the candidate knows it
    term: int


@dataclass(frozen=True, slots=True)
class VoteCame:
    """The answer to AskVotes of one device."""

    voter: DeviceId
    deployment: DeploymentId
    term: int
    granted: bool


@dataclass(frozen=True, slots=True)
class ServiceSought:
    """The answer to SeekService: whether the devices that are here can hold the model."""

    deployment: DeploymentId
    feasible: bool


@dataclass(frozen=True, slots=True)
class StreamsChanged:
    """Whether answers are being streamed by a deployment that this device coordinates."""

    deployment: DeploymentId
    streaming: bool


@dataclass(frozen=True, slots=True)
class TurnCame:
    """The time that `deadline` named has come."""


SuccessionEvent = (
    PlanTold | ObeyedTold | DeploymentOver | PresenceChanged | Equipped | VoteAsked | VoteCame | ServiceSought
    | StreamsChanged | TurnCame
)  # fmt: skip


# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SeekService:
    """Find out whether the devices that are here could serve the deployment's model; answered by ServiceSought."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class AskVotes:
    """Ask these devices; each answers with VoteCame. `plan` is the last one that this device knows of."""

    plan: CoordinatedPlan
    term: int
    devices: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True)
class Obey:
    """The vote is given: from now on the deployment's shards here obey the candidate."""

    deployment: DeploymentId
    candidate: DeviceId
    term: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The vote is not given, for this reason."""

    deployment: DeploymentId
    candidate: DeviceId
    reason: str


@dataclass(frozen=True, slots=True)
class TakeOver:
    """Coordinate the deployment from now on, with epochs after `epoch`, which grows with the term of the votes."""

    deployment: DeploymentId
    epoch: int


@dataclass(frozen=True, slots=True)
class ServeAnew:
    """Serve the deployment's model as a new deployment, with what this device can reach."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class Stay:
    """Tell everyone that the deployment goes on here, whatever another device that coordinates the same does."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class Drain:
    """Let the deployment take no new sequences: it ends when those that run have ended. `to` goes on as `other`."""

    deployment: DeploymentId
    to: DeviceId
    other: DeploymentId


@dataclass(frozen=True, slots=True)
class DrainNoMore:
    """Let the deployment take new sequences again: who was to go on with it has let go."""

    deployment: DeploymentId


@dataclass(frozen=True, slots=True)
class GiveWay:
    """Stop coordinating the deployment here: `to` goes on with it."""

    deployment: DeploymentId
    to: DeviceId


SuccessionAction = (
    SeekService | AskVotes | Obey | Refuse | TakeOver | ServeAnew | Stay | Drain | DrainNoMore | GiveWay
)  # fmt: skip
