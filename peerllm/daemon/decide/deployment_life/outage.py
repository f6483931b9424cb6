"""What a deployment that does not go on waits for, in words for people: who is away, and who takes over. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from peerllm.daemon.control_messages import DeploymentState
from peerllm.daemon.decide.deployment_life.deployment_events import DeviceCondition
from peerllm.types import DeviceId

AWAY = ("silent", "gone")


class Outage:
    """`note` how devices are, `begin` when the running plan does not go on, `over` when its answers do.

    `name` says what a device is called.
    """

    def __init__(self, name: Callable[[DeviceId], str]) -> None:
        self._name = name
        self._conditions: dict[DeviceId, DeviceCondition] = {}
        self._reason = ""  # why the running plan does not go on; "": there is no outage
        self._plan = frozenset[DeviceId]()  # its devices ...
        self._lost: dict[DeviceId, None] = {}  # ... and those of them that were away since then, in that order

    def note(self, device: DeviceId, condition: DeviceCondition) -> None:
        self._conditions[device] = condition
        if self._reason:
            self._note_lost()

    def begin(self, devices: Iterable[DeviceId], reason: str) -> None:
        """The plan of these devices does not go on: the one that served, or one that answers were changing to."""
        self._plan = frozenset(devices)
        self._reason = reason
        self._note_lost()

    def over(self) -> None:
        self._reason = ""
        self._lost.clear()

    def waits_for(self, reason: str) -> str:
        """What it waits for while there is no plan, for that reason."""
        away = self._away()
        return f"waiting for {listed(map(self._name, away))} to come back: {reason}" if away else reason

    def message(self, state: DeploymentState, doing: str, devices: Sequence[DeviceId]) -> str:
        """What is done in another state. `doing`: as it is put where there is no outage; `devices` of its plan."""
        match state:
            case "serving":
                return self._serving(devices)
            case "planning":
                return f"{self._cause()}; {doing}" if self._reason else doing
            case "loading":
                return f"{self._cause()}; {self._loading(doing, devices)}" if self._reason else doing
            case _:
                return ""

    def _serving(self, devices: Sequence[DeviceId]) -> str:
        silent = [device for device in devices if self._conditions.get(device) == "silent"]
        if silent:
            return f"nothing is heard of {listed(map(self._name, silent))}, answers wait"
        if not self._reason:
            return ""
        what = f"what {listed(map(self._name, self._lost))} held" if self._lost else "the answers so far"
        return f"computing again {what}"

    def _loading(self, doing: str, devices: Sequence[DeviceId]) -> str:
        away = self._away()
        if not away:
            return doing
        verb, whose = "takes" if len(devices) == 1 else "take", "its" if len(away) == 1 else "their"
        return f"{listed(map(self._name, devices))} {verb} over {whose} layers"

    def _cause(self) -> str:
        if away := self._away():
            return f"{listed(map(self._name, away))} {'is' if len(away) == 1 else 'are'} gone"
        if self._lost:
            return f"{listed(map(self._name, self._lost))} {'is' if len(self._lost) == 1 else 'are'} back"
        return self._reason

    def _away(self) -> list[DeviceId]:
        return [device for device in self._lost if self._conditions[device] in AWAY]

    def _note_lost(self) -> None:
        self._lost |= {device: None for device in sorted(self._plan) if self._conditions.get(device) in AWAY}


def listed(names: Iterable[str]) -> str:
    """Of one name at least: "a", "a and b", "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
