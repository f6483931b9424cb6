"""What happens to a deployment and what is to be done about it: the words between its decider and its coordinator.

The decider turns events into actions and touches nothing. The coordinator carries the actions out in their order, and
answers MakePlan, Establish, Renew, CarryOver and SwitchTo with exactly one event each, at any later time.
A later MakePlan or SwitchTo takes the place of an earlier one that is not answered yet; Abandon that of the Establish,
Renew and CarryOver of its epoch. Answers that come all the same are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peerllm.types import DeviceId, Stage

# online: it can be used. silent: nothing heard for a second, its connection stands. gone: its process ended, it left,
# or it was silent for so long that nobody waits for it. leaving: it is here, but asks to hold nothing any more.
DeviceCondition = Literal["online", "silent", "gone", "leaving"]


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceIs:
    """A device's condition changed; `renewed`: it is reached over a new connection, so its data links may be dead.

    Told of every device of the household before the first Asked or DeadlineReached, and of this device when its engine
    can be used (again). `reason` names the device, for people.
    """

    device: DeviceId
    condition: DeviceCondition
    reason: str = ""
    renewed: bool = False


@dataclass(frozen=True, slots=True)
class EngineLost:
    """All that a device had loaded is gone with its engine; it can be used again. `epoch`: the last it had work in."""

    device: DeviceId
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class LinksLost:
    """A data link between two devices broke; what is loaded on both sides of it is still there."""

    device: DeviceId  # who tells it
    epoch: int
    reason: str
    other: DeviceId | None = None  # at the other end, where that is known


@dataclass(frozen=True, slots=True)
class ConditionsChanged:
    """Memory was freed or taken, a link or a device's speed was measured anew: another plan may be better now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Somebody waits for this deployment: a person at `peerllm run`, or a request."""


@dataclass(frozen=True, slots=True)
class PlanFound:
    """Answers MakePlan. `stay`: the running plan is the best one when the cost of moving counts."""

    number: int
    stages: tuple[Stage, ...]
    stay: bool
    beside: bool  # it fits beside what is loaded for the running plan, so that nothing has to stop for it
    reason: str  # why stay, or why move; for people


@dataclass(frozen=True, slots=True)
class NoPlan:
    """Answers MakePlan: no plan is feasible. `lasting`: nothing that devices do can change that."""

    number: int
    reason: str
    lasting: bool = False
    contended: bool = False  # memory that the household lends is promised elsewhere, and may soon be let go of


@dataclass(frozen=True, slots=True)
class Established:
    """Answers Establish and Renew: every stage of the epoch is loaded and its links stand."""

    epoch: int


@dataclass(frozen=True, slots=True)
class NotEstablished:
    """Answers Establish and Renew: that failed, and nothing is left of the epoch.

    The next plans do without the `device` if they can. None: none is to blame, or the one that refused can be used for
    less, which the search for plans knows. `past`: a device has later epochs, which another coordinator began.
    """

    epoch: int
    device: DeviceId | None
    reason: str
    lasting: bool = False
    past: bool = False


@dataclass(frozen=True, slots=True)
class Carried:
    """Answers CarryOver, whether all, some or nothing could be copied: what is missing is computed again."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Switched:
    """Answers SwitchTo: no sequence runs in an earlier epoch any more. `reason` says why not, if that failed."""

    epoch: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The time that `deadline` named has come."""


DeploymentEvent = (
    DeviceIs | EngineLost | LinksLost | ConditionsChanged | Asked | PlanFound | NoPlan | Established | NotEstablished
    | Carried | Switched | DeadlineReached
)  # fmt: skip


# ---- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Search a plan without some devices; `compare`: stay with the running plan unless moving is worth its cost."""

    number: int
    without: frozenset[DeviceId]
    compare: bool


@dataclass(frozen=True, slots=True)
class Establish:
    """Reserve, load and link the plan of that number as this epoch, beside the running one.

    With `first_release` what earlier epochs hold and this one does not use is let go of before, since both do not fit.
    """

    epoch: int
    number: int
    first_release: bool = False


@dataclass(frozen=True, slots=True)
class Renew:
    """Establish the running plan once more as this epoch: all that is loaded stays, the links are made anew."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop establishing this epoch and let go of what it alone holds."""

    epoch: int


@dataclass(frozen=True, slots=True)
class CarryOver:
    """Copy the running sequences' state to where the epoch's plan has their layers, while decoding goes on."""

    epoch: int


@dataclass(frozen=True, slots=True)
class SwitchTo:
    """New sequences begin in this epoch, running ones change to it between two steps. It ends an earlier SwitchTo."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ReleaseBefore:
    """Let go of all epochs before this one, on all devices that can be told."""

    epoch: int


@dataclass(frozen=True, slots=True)
class BecomeServing:
    """Say that the deployment serves; `note` is for people ("" or what it serves with less of, or why it stays)."""

    note: str = ""


@dataclass(frozen=True, slots=True)
class BecomeWaiting:
    """Say that the deployment does not go on now, and why; running answers wait."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the deployment with this reason: it never served, and nothing that may change would help."""

    reason: str


DeploymentAction = (
    MakePlan | Establish | Renew | Abandon | CarryOver | SwitchTo | ReleaseBefore | BecomeServing | BecomeWaiting
    | GiveUp
)  # fmt: skip
