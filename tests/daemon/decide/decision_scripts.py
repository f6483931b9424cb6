"""Scripts that the deployment decider is tested with: what happens line by line, and what is done about it below.

A line that begins at the margin is a comment (#), the household (first of all), or an event with its time. Between two
events the deadlines that the decider names are reached. Indented lines are what is expected: its actions (->) and then
how it stands (=). PEERLLM_REWRITE=1 writes down what is done now; read the difference before you commit it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peerllm.daemon.decide.deployment_life import deployment_events as on
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.types import Stage

MOST_DEADLINES = 60  # between two events; more is a decider that never rests


@dataclass
class Household:
    names: tuple[str, ...]
    decider: DeploymentDecider
    now: float = 0.0
    lines: list[str] = field(default_factory=list)

    def id(self, name: str) -> str:
        return f"{self.names.index(name):08x}{name}"

    def play(self, at: float, event: on.DeploymentEvent) -> Iterator[str]:
        """What is done until the event has been handled."""
        for _ in range(MOST_DEADLINES):
            due = self.decider.deadline()
            if due is None or due >= at or not self.decider._rules.begun:
                break
            assert due > self.now or due == 0.0, f"the deadline {due} lies in the past at {self.now}"
            self.now = due
            actions = self.decider.handle(on.DeadlineReached(), due)
            yield f"    at {due:g}:"
            yield from self._told(actions)
        else:
            raise AssertionError("it never rests")
        self.now = at
        yield from self._told(self.decider.handle(event, at))

    def _told(self, actions: list[on.DeploymentAction]) -> Iterator[str]:
        for action in actions:
            yield f"    -> {self._action(action)}"
        rules = self.decider._rules
        running = f"epoch {rules.running.epoch}" if rules.running is not None else "no epoch"
        switching = ", switching" if rules.running is not None and rules.running.switching else ""
        state = "serving" if rules.serving else "not serving"
        due = self.decider.deadline()
        until = f", until {due:g}" if due is not None else ""
        yield f"    = {state}, {running}{switching}, {type(rules.under_way).__name__}{until}"

    def _action(self, action: on.DeploymentAction) -> str:
        match action:
            case on.MakePlan(number, without, compare):
                names = " and ".join(device[8:] for device in sorted(without))
                return f"MakePlan {number}{' without ' * bool(names)}{names}{' to compare' * compare}"
            case on.Establish(epoch, number, first_release):
                return (
                    f"Establish epoch {epoch} by plan {number}{', first release what it does not use' * first_release}"
                )
            case on.BecomeServing(text) | on.BecomeWaiting(text) | on.GiveUp(text):
                return f"{type(action).__name__}{f' ({text})' if text else ''}"
            case _:
                return f"{type(action).__name__} epoch {action.epoch}"

    def stages(self, text: str) -> tuple[Stage, ...]:
        found = re.findall(r"(\w+):(\d+)-(\d+)", text)
        return tuple(Stage(self.id(name), int(first), int(last)) for name, first, last in found)

    def event(self, text: str) -> on.DeploymentEvent:
        said = re.search(r" \((.*)\)$", text)
        reason, text = (said[1], text[: said.start()]) if said else ("", text)
        words = text.split()
        match words:
            case [name, "is", condition, *renewed] if name in self.names:
                said_of = reason or (f"{name} is reached anew" if renewed else f"{name} is {condition}")
                return on.DeviceIs(self.id(name), condition, said_of, renewed == ["anew"])
            case [name, "loses", "its", "engine", "of", "epoch", epoch]:
                return on.EngineLost(self.id(name), int(epoch), reason or f"{name}: its engine crashed")
            case [name, "loses", "its", "link", "to", other, "of", "epoch", epoch]:
                return on.LinksLost(
                    self.id(name), int(epoch), reason or f"{name} lost its link to {other}", self.id(other)
                )
            case ["conditions", "change"]:
                return on.ConditionsChanged(reason)
            case ["somebody", "asks"]:
                return on.Asked()
            case ["plan", number, "is", "to", "stay"]:
                return on.PlanFound(int(number), (), stay=True, beside=True, reason=reason)
            case ["plan", number, "is", *rest]:
                beside = rest[-1:] != ["alone"]
                return on.PlanFound(int(number), self.stages(text), stay=False, beside=beside, reason=reason)
            case ["plan", number, "cannot", *why]:
                return on.NoPlan(int(number), reason, "ever" in why, "contended" in why)
            case ["epoch", epoch, "stands"]:
                return on.Established(int(epoch))
            case ["epoch", epoch, "fails", *rest]:
                name = next((word for word in rest if word in self.names), None)
                return on.NotEstablished(int(epoch), self.id(name) if name else None, reason, "ever" in rest)
            case ["epoch", epoch, "is", "carried"]:
                return on.Carried(int(epoch))
            case ["epoch", epoch, "is", "switched", "to"]:
                return on.Switched(int(epoch), reason)
            case ["time", "passes"]:
                return on.DeadlineReached()
        raise ValueError(f"no event: {text}")


def play(script: str) -> str:
    """The script with what is expected replaced by what is done."""
    lines: list[str] = []
    house: Household | None = None
    for line in script.splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if not line or line.startswith("#"):
            continue
        word, rest = line.split(maxsplit=1)
        if word == "household":
            names = tuple(name for name in rest.split() if name != "(lasting)")
            house = Household(names, DeploymentDecider("00000000" + names[0], "(lasting)" in rest, 0))
            continue
        assert house is not None, "the household comes first"
        lines += house.play(float(word), house.event(rest))
    return "\n".join(lines) + "\n"
