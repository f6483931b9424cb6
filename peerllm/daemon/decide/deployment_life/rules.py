"""The rules of a deployment's life. After every event the first of them that applies acts, until none does.

| rule | when | what is done |
|---|---|---|
| `next_attempt` | the time to wait after a failed attempt is over | nothing is under way any more |
| `say_waiting` | the running plan lost a device, an engine or a link, or one is silent for 2 s | BecomeWaiting |
| `give_up_target` | the plan under way uses a device that is gone, leaving or silent for 2 s | Abandon |
| `keep_running_plan` | the device that the plan under way does without is back, and lost nothing | Abandon |
| `stop_searching` | the running plan loses something, and a plan is searched for a lesser reason | forget the search |
| `stop_carrying` | the same while state is copied to the next plan | SwitchTo |
| `renew_links` | all devices are here, but links broke or may have: one is reached over another connection | Renew |
| `serve_on` | all devices are here again, and nothing was lost | BecomeServing |
| `plan` | no plan runs; a device of the running plan is silent, lost something, or is leaving | MakePlan without it |
| `establish` | a plan is found, and it is sure that it is needed | Establish |
| `let_go` | the deployment waits for a minute | ReleaseBefore the next epoch |
| `compare` | devices joined, or conditions changed, and things settled | MakePlan, to compare |
| `release_missed` | a device that could not be told to let go is here again | ReleaseBefore the running epoch |

"What is known" (situation.py): the devices, the running plan, and the one thing that is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from peerllm.daemon.decide.deployment_life.deployment_events import (
    Abandon,
    BecomeServing,
    BecomeWaiting,
    DeploymentAction,
    Establish,
    GiveUp,
    MakePlan,
    ReleaseBefore,
    Renew,
    SwitchTo,
)
from peerllm.daemon.decide.deployment_life.pacing import Attempts, Comparisons
from peerllm.daemon.decide.deployment_life.situation import (
    BackingOff,
    Carrying,
    Ended,
    Establishing,
    HouseholdDevices,
    Idle,
    PlanInHand,
    Planning,
    RunningPlan,
    UnderWay,
    Why,
)
from peerllm.daemon.decide.membership import GRACE_S
from peerllm.types import DeviceId

BETTER_PLANNED_ANEW = {("gain", "leave"), ("gain", "loss"), ("leave", "loss")}  # what it is searched for, is needed for

Done = list[DeploymentAction] | None  # None: the rule does not apply
Rule = Callable[["DeploymentRules", float], Done]


class DeploymentRules:
    """What is known of one deployment, and what follows from it."""

    def __init__(self, me: DeviceId, lasting: bool, epoch: int) -> None:
        self.me, self.lasting, self.epoch = me, lasting, epoch
        self.begun = self.serving = False
        self.running: RunningPlan | None = None
        self.under_way: UnderWay = Idle()
        self.devices = HouseholdDevices(me)
        self.attempts = Attempts(me)
        self.comparisons = Comparisons()
        self._number = 0  # of the last MakePlan ...
        self.planned_without = frozenset[DeviceId]()  # ... and the devices that could not be used then
        self._waiting_since = 0.0
        self._told = ""  # the last note or reason
        self._holding: set[DeviceId] = set()  # devices that may hold something ...
        self._missed: set[DeviceId] = set()  # ... and those that could not be told to let go of it

    # ---- rules, in their order ------------------------------------------------------------------------------------

    def next_attempt(self, now: float) -> Done:
        work = self.under_way
        if not isinstance(work, BackingOff) or (now < work.until and not (work.why == "loss" and self.whole())):
            return None
        self.under_way = Idle()
        return []

    def say_waiting(self, now: float) -> Done:
        outage = self.outage(now)
        if not self.serving or not outage:
            return None
        assert self.running is not None
        self._lose(self.running.devices, now)
        self.attempts.repair_after(now - self.running.since, now)
        self._waiting_since = now
        hopeless = self.attempts.hopeless(self.devices.unusable())
        return self._stop_serving(f"{outage}; {self.attempts.reason}" if hopeless else outage)

    def give_up_target(self, now: float) -> Done:
        work = self.under_way
        if not isinstance(work, PlanInHand | Establishing | Carrying):
            return None
        devices = {stage.device for stage in work.stages}
        out = self.devices.given_up(devices, now)
        if isinstance(work, PlanInHand):
            out |= self.devices.of(devices, "silent")
        if not isinstance(work, Establishing) or not work.renewal:
            out |= self.devices.of(devices - {self.me}, "leaving")
        if not out:
            return None
        self._lose(devices, now)
        return self.abandon(work)

    def keep_running_plan(self, now: float) -> Done:
        work, running = self.under_way, self.running
        if not isinstance(work, Planning | PlanInHand | Establishing) or running is None or not work.because:
            return None
        if self.devices.of(running.devices, "silent", "gone", "leaving") or running.engines_lost:
            return None
        if isinstance(work, Establishing) and (running.doubtful or work.because & self.devices.distrusted(now)):
            return None
        return self.abandon(work)

    def stop_searching(self, now: float) -> Done:
        work = self.under_way
        if not isinstance(work, Planning) or (work.why, self.need()) not in BETTER_PLANNED_ANEW:
            return None
        return self.abandon(work)

    def stop_carrying(self, now: float) -> Done:
        work = self.under_way
        return self.switch(work, now) if isinstance(work, Carrying) and self.outage(now) else None

    def renew_links(self, now: float) -> Done:
        running = self.running
        if not isinstance(self.under_way, Idle) or running is None or not running.links_doubted:
            return None
        if self.suspects() or running.engines_lost or not self.attempts.may_renew(now):
            return None
        self.attempts.renew(now)
        self.epoch += 1
        self.under_way = Establishing(self.epoch, "loss", frozenset(), running.stages, renewal=True)
        return [Renew(self.epoch)]

    def serve_on(self, _: float) -> Done:
        if self.serving or not isinstance(self.under_way, Idle | Establishing) or not self.whole():
            return None
        self._serve()
        return [BecomeServing()]

    def plan(self, now: float) -> Done:
        why = self.need()
        if not isinstance(self.under_way, Idle) or why is None or now < self.plan_at():
            return None
        return self.make_plan(why, careful=True, now=now)

    def establish(self, now: float) -> Done:
        work = self.under_way
        if not isinstance(work, PlanInHand) or (work.why == "loss" and self.suspects() and not self.outage(now)):
            return None
        self.epoch += 1
        self.under_way = Establishing(self.epoch, work.why, work.because, work.stages)
        if work.beside:
            self._holding |= {stage.device for stage in work.stages}
            return [Establish(self.epoch, work.number)]
        stops = self._stop_serving(work.reason) if self.serving else []
        self._let_go_of({stage.device for stage in work.stages})
        self.running = None
        return [*stops, Establish(self.epoch, work.number, first_release=True)]

    def let_go(self, now: float) -> Done:
        if self.serving or self.running is None or not isinstance(self.under_way, Idle):
            return None
        if now < self.let_go_at():
            return None
        self.running = None
        self._let_go_of(set())
        return [ReleaseBefore(self.epoch + 1)]

    def compare(self, now: float) -> Done:
        if not isinstance(self.under_way, Idle) or not self.may_compare() or now < self.comparisons.at():
            return None
        return self.make_plan("gain", careful=True, now=now)

    def release_missed(self, _: float) -> Done:
        running = self.running
        if running is None or not isinstance(self.under_way, Idle) or not self.may_compare():
            return None
        here = self._missed - self.devices.of(self._missed, "silent", "gone")
        if not here or any(self.comparisons.waits_for(device) for device in here):
            return None
        return self.release()

    TABLE: tuple[Rule, ...] = (
        next_attempt,
        say_waiting,
        give_up_target,
        keep_running_plan,
        stop_searching,
        stop_carrying,
        renew_links,
        serve_on,
        plan,
        establish,
        let_go,
        compare,
        release_missed,
    )

    # ---- what rules ask -------------------------------------------------------------------------------------------

    def need(self) -> Why | None:
        """Why a plan is needed, if one is."""
        running = self.running
        if running is None:
            return "start" if self.begun else None
        if self.suspects() or running.engines_lost or running.links_doubted:
            return "loss"
        return "leave" if self.devices.of(running.devices - {self.me}, "leaving") else None

    def suspects(self) -> frozenset[DeviceId]:
        """Devices of the running plan that are not heard."""
        return self.devices.of(self.running.devices, "silent", "gone") if self.running is not None else frozenset()

    def whole(self) -> bool:
        """Whether the running plan can go on as it is."""
        return self.running is not None and self.need() != "loss"

    def outage(self, now: float) -> str:
        """Why the running plan cannot go on; "" if it can, or if that is not sure yet."""
        running = self.running
        if running is None:
            return ""
        given_up = sorted(self.devices.given_up(running.devices, now))
        reasons = [*running.engines_lost.values(), *(self.devices.reason(device) for device in given_up)]
        return next(iter([*reasons, *filter(None, (running.doubtful, running.links_lost))]), "")

    def doubted(self, now: float) -> frozenset[DeviceId]:
        """Devices that a careful plan does without, though they are here."""
        return (self.devices.distrusted(now) | self.attempts.shunned) - {self.me} - self.devices.unusable()

    def plan_at(self) -> float:
        """When the plan that is needed may be searched."""
        return self.attempts.next_at(self.devices.unusable())

    def let_go_at(self) -> float:
        return self._waiting_since + GRACE_S

    def may_compare(self) -> bool:
        """Whether the running plan serves, undisturbed."""
        return self.serving and self.running is not None and not self.running.switching and self.need() is None

    # ---- what rules do --------------------------------------------------------------------------------------------

    def make_plan(self, why: Why, careful: bool, now: float) -> list[DeploymentAction]:
        self._number += 1
        used = self.running.devices - {self.me} if self.running is not None else frozenset[DeviceId]()
        because = self.devices.of(used, "silent", "gone", "leaving")
        doubted = self.doubted(now) if careful else frozenset[DeviceId]()
        self.planned_without = self.devices.unusable()
        without = self.planned_without | (doubted - used if why == "gain" else doubted)
        self.attempts.begin()
        self.comparisons.begin(without)
        self.devices.leave_out(without)
        self.under_way = Planning(self._number, why, because, careful)
        return [MakePlan(self._number, without, compare=why == "gain")]

    def switch(self, work: Establishing | Carrying, now: float) -> list[DeploymentAction]:
        if work.why == "gain":
            self.comparisons.moved(now)
        replaces = self.running is not None
        self.running = RunningPlan(work.epoch, work.stages, now, replaces)
        self.under_way, self.lasting = Idle(), True
        self._serve()
        return [SwitchTo(work.epoch), BecomeServing()]

    def fail(
        self, work: Establishing | Carrying, device: DeviceId | None, reason: str, now: float, lasting: bool = False
    ) -> list[DeploymentAction]:
        """The plan under way could not be established, or broke before it was switched to."""
        self.under_way = Idle()
        if isinstance(work, Establishing) and work.renewal and self.running is not None:
            self.running.links_lost = self.running.links_lost or reason
        if lasting and not self.lasting:
            return self.end(reason)
        if work.why == "gain" and self.running is not None:
            self.comparisons.failed(now)
            return self.stay(reason)
        if device is not None and device != self.me:
            self.attempts.shunned.add(device)
        return self.again(work.why, reason, now)

    def again(self, why: Why, reason: str, now: float) -> list[DeploymentAction]:
        """Try once more after a while; at last wait, or give up if it never served."""
        wait_s = self.attempts.wait_s()
        if wait_s is not None:
            self.under_way = BackingOff(now + wait_s, why)
            return []
        return self.wait(reason, now) if self.lasting else self.end(reason)

    def wait(self, reason: str, now: float) -> list[DeploymentAction]:
        """No plan works now: try again later, and at once when devices change."""
        self.attempts.give_up(self.planned_without, reason, now)
        return [] if self.serving else self._stop_serving(reason)

    def end(self, reason: str) -> list[DeploymentAction]:
        self.under_way = Ended()
        return [GiveUp(reason)]

    def abandon(self, work: Planning | PlanInHand | Establishing | Carrying) -> list[DeploymentAction]:
        self.under_way = Idle()
        self.comparisons.cancelled(self.devices.unusable())
        if not isinstance(work, Establishing | Carrying):
            return []
        self._missed |= self.devices.of(self._holding, "silent", "gone")
        return [Abandon(work.epoch)]

    def release(self) -> list[DeploymentAction]:
        """All epochs before the running one."""
        assert self.running is not None
        self._let_go_of(self.running.devices)
        return [ReleaseBefore(self.running.epoch)]

    def stay(self, note: str) -> list[DeploymentAction]:
        """It stays as it is; people are told why, once."""
        if note == self._told or not self.serving:
            return []
        self._told = note
        return [BecomeServing(note)]

    def _lose(self, devices: Collection[DeviceId], now: float) -> None:
        for device in self.devices.given_up(devices, now):
            self.devices.lose(device, now)

    def _stop_serving(self, reason: str) -> list[DeploymentAction]:
        if not self.serving and reason == self._told:
            return []
        self.serving, self._told = False, reason
        return [BecomeWaiting(reason)]

    def _serve(self) -> None:
        self.serving, self._told = True, ""
        self.attempts.forget()

    def _let_go_of(self, kept: Collection[DeviceId]) -> None:
        """Devices are told to let go, those that cannot be told now are told when they are here again."""
        self._missed = set(self.devices.of(self._holding, "silent", "gone"))
        self._holding = self._missed | set(kept)
