"""What a deployment does when devices come, go, fall silent, fail or slow down. `handle(event, now) -> actions`.

An event is noted here: it changes what is known of the devices and the running plan, or what is under way. What is done
about it say the rules (deployment_life/rules.py).
"""

from __future__ import annotations

from math import inf
from typing import assert_never

from peerllm.daemon.decide.deployment_life.deployment_events import (
    Asked,
    Carried,
    CarryOver,
    ConditionsChanged,
    DeadlineReached,
    DeploymentAction,
    DeploymentEvent,
    DeviceIs,
    EngineLost,
    Established,
    LinksLost,
    NoPlan,
    NotEstablished,
    PlanFound,
    Switched,
)
from peerllm.daemon.decide.deployment_life.rules import DeploymentRules
from peerllm.daemon.decide.deployment_life.situation import (
    BackingOff,
    Carrying,
    Ended,
    Establishing,
    Idle,
    PlanInHand,
    Planning,
)
from peerllm.types import DeviceId

GATHER_S = 5.0  # how long a model too large for the devices here waits at first for those that have not arrived
# Past a term of those that followed this device. Others begin at thousands, which ten steps of this stay away from.
EPOCHS_OF_OTHERS = 2700
MOST_RULES = 32  # that one event may set off; more is a mistake in the rules


class DeploymentDecider:
    """Decides for one deployment, on its coordinator `me`. `lasting`: it has served, and waits instead of giving up.

    `epoch` is the last number that is used up. The first Asked or DeadlineReached begins it.
    """

    def __init__(self, me: DeviceId, lasting: bool, epoch: int) -> None:
        self._rules = DeploymentRules(me, lasting, epoch)
        self._gather_until = -inf
        self._came_meanwhile = False  # a device that can be used came while a plan was searched

    def handle(self, event: DeploymentEvent, now: float) -> list[DeploymentAction]:
        """What is to be done, in this order; `now` is any clock that only rises."""
        rules = self._rules
        if isinstance(rules.under_way, Ended):
            return []
        actions = self._note(event, now)
        for _ in range(MOST_RULES):
            done = next((found for rule in rules.TABLE if (found := rule(rules, now)) is not None), None)
            if done is None:
                return actions
            actions += done
        raise AssertionError(f"the rules come to no end: {event}, {rules.under_way}")

    def deadline(self) -> float | None:
        """When DeadlineReached is wanted; None if only another event can change anything."""
        rules = self._rules
        if not rules.begun:
            return 0.0
        times = [rules.devices.silent_until(device) for device in self._waited_for()]
        match rules.under_way:
            case Ended():
                return None
            case BackingOff(until=until):
                times.append(until)
            case Idle():
                if rules.need() is not None:
                    times.append(rules.plan_at())
                if rules.may_compare():
                    times.append(rules.comparisons.at())
                if rules.running is not None and not rules.serving:
                    times.append(rules.let_go_at())
            case _:
                pass  # an answer is awaited
        least = min(times, default=inf)
        return None if least == inf else least

    def _waited_for(self) -> frozenset[DeviceId]:
        """Silent devices of the running plan or of the one under way for which the time runs."""
        rules, devices = self._rules, set[DeviceId]()
        if rules.running is not None and rules.serving:
            devices |= rules.running.devices
        if isinstance(rules.under_way, Establishing | Carrying):
            devices |= {stage.device for stage in rules.under_way.stages}
        return rules.devices.of(devices, "silent")

    # ---- events: what is known changes ----------------------------------------------------------------------------

    def _note(self, event: DeploymentEvent, now: float) -> list[DeploymentAction]:
        rules, work = self._rules, self._rules.under_way
        match event:
            case DeviceIs():
                self._note_device(event, now)
            case EngineLost(device, epoch, reason):
                return self._note_engine(device, epoch, reason, now)
            case LinksLost():
                return self._note_links(event, now)
            case ConditionsChanged():
                rules.comparisons.conditions_changed(now)
                rules.attempts.conditions_changed(now)
            case Asked():
                self._begin(now)
                rules.attempts.asked(now)
            case DeadlineReached():
                self._begin(now)
            case PlanFound(number):
                return self._note_plan(work, event, now) if isinstance(work, Planning) and work.number == number else []
            case NoPlan(number):
                return self._note_none(work, event, now) if isinstance(work, Planning) and work.number == number else []
            case Established(epoch):
                return self._note_stands(work, now) if isinstance(work, Establishing) and work.epoch == epoch else []
            case NotEstablished(epoch, device, reason, lasting, past):
                if isinstance(work, Establishing) and work.epoch == epoch:
                    rules.epoch += EPOCHS_OF_OTHERS if past else 0
                    return rules.fail(work, device, reason, now, lasting)
            case Carried(epoch):
                return rules.switch(work, now) if isinstance(work, Carrying) and work.epoch == epoch else []
            case Switched(epoch, reason):
                return self._note_switched(epoch, reason)
            case _:
                assert_never(event)
        return []

    def _begin(self, now: float) -> None:
        if not self._rules.begun:
            self._rules.begun, self._gather_until = True, now + GATHER_S

    def _note_device(self, event: DeviceIs, now: float) -> None:
        rules, device, running = self._rules, event.device, self._rules.running
        joined = rules.devices.note(event, now)
        self._came_meanwhile |= joined and isinstance(rules.under_way, Planning)
        if event.condition != "online":
            rules.comparisons.away(device)
        elif joined or event.renewed:
            rules.attempts.shunned.discard(device)
            rules.attempts.hope()
            if isinstance(rules.under_way, BackingOff):
                rules.under_way = Idle()
        if running is None or device not in running.devices:
            if joined and device != rules.me:
                rules.comparisons.joined(device, rules.devices.distrusted_until(device), now)
            return
        if event.condition == "gone":
            running.doubtful = running.doubtful or rules.devices.reason(device)
        elif event.renewed:
            running.renewed = True

    def _note_engine(self, device: DeviceId, epoch: int, reason: str, now: float) -> list[DeploymentAction]:
        rules, running, target = self._rules, self._rules.running, self._rules.under_way
        hit = running is not None and device in running.devices and running.epoch <= epoch
        known = running is not None and bool(running.doubtful)  # a renewal loads it again already
        if running is not None and hit:
            running.engines_lost[device] = reason
            rules.attempts.conditions_changed(now)  # what it held is free; a search under way may not have known
            if not known:
                rules.devices.fail(device, now)
        if not isinstance(target, Establishing | Carrying) or all(stage.device != device for stage in target.stages):
            return []
        if target.epoch <= epoch:
            rules.devices.fail(device, now)
            return [*rules.abandon(target), *rules.fail(target, device, reason, now)]
        renews = isinstance(target, Establishing) and target.renewal
        return rules.abandon(target) if renews and hit and not known else []

    def _note_links(self, event: LinksLost, now: float) -> list[DeploymentAction]:
        rules, running, target = self._rules, self._rules.running, self._rules.under_way
        if running is not None and running.epoch == event.epoch:
            running.links_lost = running.links_lost or event.reason
            if rules.attempts.renewed_in_vain(now):
                ends = [device for device in (event.other, event.device) if device not in (None, rules.me)]
                rules.attempts.shunned.update(filter(None, ends[:1]))
        elif isinstance(target, Establishing | Carrying) and target.epoch == event.epoch:
            return [*rules.abandon(target), *rules.fail(target, None, event.reason, now)]
        return []

    def _note_plan(self, work: Planning, found: PlanFound, now: float) -> list[DeploymentAction]:
        rules = self._rules
        self._came_meanwhile = False
        if found.stay:
            rules.under_way = Idle()
            rules.comparisons.stayed(now)
            return rules.stay(found.reason)
        rules.under_way = PlanInHand(work.number, work.why, work.because, found.stages, found.beside, found.reason)
        return []

    def _note_none(self, work: Planning, event: NoPlan, now: float) -> list[DeploymentAction]:
        rules, came, self._came_meanwhile = self._rules, self._came_meanwhile, False
        if came and not event.lasting and not rules.lasting:  # the search may not have known of it
            return rules.make_plan(work.why, careful=work.careful, now=now)
        if work.careful and rules.doubted(now):
            return rules.make_plan(work.why, careful=False, now=now)
        rules.under_way = Idle()
        if work.why == "gain":
            rules.comparisons.stayed(now)
            return []
        if rules.lasting:
            return rules.wait(event.reason, now)
        if not event.lasting and now < self._gather_until and rules.devices.unusable():
            rules.attempts.give_up(rules.planned_without, event.reason, now, until=self._gather_until)
            return []
        if event.lasting or not event.contended:
            return rules.end(event.reason)
        return rules.again(work.why, event.reason, now)

    def _note_stands(self, work: Establishing, now: float) -> list[DeploymentAction]:
        rules = self._rules
        if work.renewal or not rules.serving or rules.suspects():
            return rules.switch(work, now)
        rules.under_way = Carrying(work.epoch, work.why, work.because, work.stages)
        return [CarryOver(work.epoch)]

    def _note_switched(self, epoch: int, reason: str) -> list[DeploymentAction]:
        rules, running = self._rules, self._rules.running
        if running is None or running.epoch != epoch:
            return []
        if reason:
            running.links_lost = running.links_lost or reason
            return []
        running.switching = False
        return rules.release() if running.replaces else []
