"""One model's life on its source: what happens goes to its decider, and what that wants done is done here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from peerllm import request_ids
from peerllm.daemon.background_tasks import LatestTasks
from peerllm.daemon.control_messages import DeploymentState, Holding, Progress, Trouble
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.daemon.decide.deployment_life.deployment_events import (
    Abandon,
    Asked,
    BecomeServing,
    BecomeWaiting,
    CarryOver,
    ConditionsChanged,
    DeadlineReached,
    DeploymentAction,
    DeploymentEvent,
    DeviceIs,
    Establish,
    GiveUp,
    MakePlan,
    NoPlan,
    ReleaseBefore,
    Renew,
    Switched,
    SwitchTo,
)
from peerllm.daemon.decide.deployment_life.outage import Outage
from peerllm.daemon.decide.holdings import HouseholdHoldings
from peerllm.daemon.decide.idle.idle_time import IdleTime
from peerllm.daemon.deployment.decision_loop import Decider, DecisionLoop
from peerllm.daemon.deployment.described_model import DescribedModel, ModelAtHand
from peerllm.daemon.deployment.establishing import Epoch, EpochNegotiation
from peerllm.daemon.deployment.figures.progress_report import ProgressReport
from peerllm.daemon.deployment.figures.shown_deployment import ShownDeployment
from peerllm.daemon.deployment.loading.idle_models import expiry
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.next_plan import NextPlan
from peerllm.daemon.deployment.planning.plan_search import PlanSearch
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.deployment.planning.serving_watch import ServingWatch
from peerllm.daemon.deployment.remembered import RememberedDeployment
from peerllm.daemon.deployment.sequences.admission import Admission
from peerllm.daemon.deployment.sequences.admitted_sequence import ServingCapacity
from peerllm.daemon.deployment.sequences.caused_sequences import CausedSequences
from peerllm.daemon.deployment.standing_epochs import PASSING, StandingEpochs
from peerllm.daemon.facade import RunOptions
from peerllm.errors import EngineError, InfeasibleError, PeerLLMError, UnavailableError
from peerllm.types import DeviceId

EPOCHS_AHEAD = 1000  # a restarted deployment goes on so many after the last epoch that was written down

log = logging.getLogger(__name__)


class Deployment:
    """Owned by the coordinator: `start` it, `stop` it; `outcome` waits until it serves, or fails.

    `served` is called whenever it serves, in a new epoch or again.
    """

    def __init__(
        self,
        options: RunOptions,
        around: Surroundings,
        timings: ProfileRequests,
        *,
        remembered: RememberedDeployment | None = None,
        at_hand: ModelAtHand | None = None,
        served: Callable[[], None] = lambda: None,
        decider: Callable[[DeviceId, bool, int], Decider] = DeploymentDecider,
    ) -> None:
        self.id = remembered.deployment if remembered is not None else secrets.token_hex(16)
        self.options = options
        self.remembered_as = remembered.options if remembered is not None else options
        self.created = int(time.time())
        self.state: DeploymentState = "planning"
        self.reason = ""
        self.inherited = remembered.inherited if remembered is not None else ""
        self.succeeds = remembered.succeeds if remembered is not None else ""
        self.took_part = set(remembered.devices if remembered is not None else ())  # devices of plans that served
        self.stays = False  # it gives way to no other device that goes on with the same
        self.yields_to = ""  # the name of the device that goes on with it, while this one ends its answers
        self.lasting = remembered is not None  # it has served: from then on it waits for devices instead of giving up
        self.report = ProgressReport(around.me, around.name, around.changed)
        self.model = DescribedModel(options, around, self._tell, at_hand)
        caused = CausedSequences(self.id, around, lambda: self._epochs.running.devices if self._epochs.running else ())
        self.sequences = Admission(self.id, around.tell_engine, around.changed, caused.begins)
        self.idle = IdleTime(options.on_demand, time.monotonic())
        self._around, self._served = around, served
        self._search = PlanSearch(options, around, timings, self._tell)
        holdings = self._holdings = HouseholdHoldings()
        self.plans = NextPlan(options, around, self._search, holdings, self.model)
        talk = EpochNegotiation(around, self.id, holdings, self._tell, self._loading, self.plans.loaded)
        self._work = LatestTasks(options.model, self._broken)
        last = remembered.epoch + EPOCHS_AHEAD if remembered is not None else 0
        self._epochs = StandingEpochs(
            self.id, last, around, self.model, self.sequences, self.plans, talk, self._work, self._feed
        )
        self._decisions = DecisionLoop(options.model, decider(around.me, self.lasting, last), self._do)
        self._watch = ServingWatch(self.id, around, self._search, self.sequences, self._serving, self._feed)
        self._outage = Outage(around.name)
        self._lessened: Epoch | None = None  # the last that serves less than an earlier one did
        self._outcomes: list[asyncio.Future[None]] = []

    # ---- what the coordinator does with it ----------------------------------------------------------------------

    def start(self, devices: Iterable[DeviceIs], holdings: Mapping[DeviceId, tuple[Holding, ...]]) -> None:
        """`devices`: how each of the household is now; `holdings`: what they have loaded."""
        for device, told in holdings.items():
            self.told(device, told)
        for event in devices:
            self._feed(event)
        self._feed(DeadlineReached())
        with request_ids.caused_by(""):
            self._watch.start(self._work)

    async def outcome(self) -> None:
        """Returns when it serves; raises why it does not, now or at the end of the attempt under way."""
        if self.state == "serving":
            return
        if self._decisions.closed:
            raise UnavailableError(self.reason or "the deployment has ended")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outcomes.append(future)
        self._feed(Asked())
        await future

    def drain(self, to: str) -> None:
        """Take no new sequences: device `to` goes on with it. Those that run end, if they can. "": take new ones."""
        self.yields_to = to
        if not to:
            self.sequences.accept()
        elif self.state == "serving":
            self.sequences.refuse(self._moved)
        else:
            self.sequences.close(self._moved)
        self._around.changed()

    async def stop(self, left: bool = False) -> None:
        """End everything, here and on the other devices; `left`: those keep it for the device that goes on."""
        self._finish("stopped", UnavailableError(f"{self.options.model} was stopped"))
        await self._work.close()
        if not left:
            await self._epochs.let_go()

    def happened(self, event: DeviceIs | ConditionsChanged) -> None:
        """The household changed."""
        self._feed(event)

    def told(self, device: DeviceId, holdings: Iterable[Holding]) -> None:
        """A device says what it has loaded."""
        self._epochs.told(device, [one for one in holdings if one.deployment == self.id])

    def trouble(self, device: DeviceId, told: Trouble) -> None:
        """A device's part of the deployment is lost, or one of its links."""
        self._epochs.trouble(device, told)

    def progress(self, device: DeviceId, event: Progress) -> None:
        """A device told how far it has fetched or loaded."""
        coming = self._epochs.coming
        if coming is not None and event.epoch == coming.number and self.state == "loading":
            self.report.loaded(device, event)

    @property
    def _moved(self) -> str:
        return f"{self.yields_to} serves {self.options.name} now; ask again"

    @property
    def epoch(self) -> int:
        """The last number that an epoch was given."""
        return self._epochs.last

    @property
    def blueprint(self) -> Blueprint | None:
        """The plan that is loaded or that serves; None while there is none."""
        epochs = {"serving": self._epochs.running, "loading": self._epochs.coming}
        epoch = epochs.get(self.state)
        return epoch.blueprint if epoch is not None else None

    def shown(self) -> ShownDeployment:
        """What is told of it to others."""
        running, failure = self._epochs.running, self._epochs.failure
        serving = self.state == "serving" and running is not None and not self.yields_to
        planned = running if serving else self._epochs.coming
        reason = self._outage.waits_for(self.reason) if self.state == "waiting" else self.reason
        return ShownDeployment(
            deployment=self.id,
            options=self.options,
            coordinator=self._around.me,
            model=self.model,
            state="stopped" if self.yields_to else self.state,
            reason=f"{self.yields_to} goes on with it" if self.yields_to else reason,
            created=self.created,
            epoch=running.number if serving and running is not None else self.epoch,
            blueprint=self.blueprint,
            message=self._outage.message(
                self.state, self.report.message, planned.devices if planned is not None else ()
            ),
            progress=1.0 if serving else self.report.done,
            missing_bytes=getattr(failure, "missing_bytes", 0) if self.state == "waiting" else 0,
            succeeds=self.succeeds,
            stays=self.stays,
            expires=expiry(self.idle, time.monotonic()),
            idle_since=int(time.time() - (time.monotonic() - self.idle.since)) if self.makes_way else 0,
        )

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def busy(self) -> bool:
        """Whether a sequence runs or waits, or somebody waits for it to serve."""
        return self.sequences.busy or bool(self._outcomes)

    @property
    def makes_way(self) -> bool:
        """Whether a request started it and nobody uses it."""
        idle = not self.busy and not self.idle.answers and self.state in ("serving", "waiting")
        return self.idle.on_demand and idle

    def belongs_to_person(self) -> None:
        """A person wants what a request may have started: it stays."""
        if not self.idle.on_demand:
            return
        self.options = replace(self.options, on_demand=False)
        self.remembered_as = replace(self.remembered_as, on_demand=False)
        self.idle.on_demand, self.idle.keep_s = False, None

    def promised(self) -> dict[DeviceId, int]:
        """Bytes that devices would have free without it."""
        return {device: self._holdings.promised_bytes(device) for device in self._holdings.devices}

    def remembered(self) -> RememberedDeployment:
        """What brings it back over a restart of this device."""
        devices = tuple(sorted(self.took_part))
        return RememberedDeployment(self.remembered_as, self.id, self.epoch, self.inherited, self.succeeds, devices)

    # ---- events in, actions out -----------------------------------------------------------------------------------

    def _feed(self, event: DeploymentEvent) -> None:
        """Let the decider handle an event, and do what it says."""
        if not self._decisions.closed:
            self._note_for_people(event)
            with request_ids.caused_by(""):  # it goes on long after a request that may have begun it
                self._decisions.feed(event)

    def _note_for_people(self, event: DeploymentEvent) -> None:
        running = self._epochs.running
        if isinstance(event, DeviceIs):
            self._outage.note(event.device, event.condition)
        elif self.state == "serving" and running is not None and event == Switched(running.number):
            self._outage.over()
            self._around.changed()

    def _do(self, action: DeploymentAction) -> None:
        match action:
            case MakePlan():
                if self.state != "serving":
                    self._become("planning", "")
                self._work.start("plan", self._make_plan(action))
            case Establish(number, plan, first_release):
                self._epochs.establish(number, self.plans.found(plan), first_release)
            case Renew(number):
                assert self._epochs.running is not None
                self._epochs.establish(number, self._epochs.running.blueprint)
            case Abandon(number):
                self._epochs.abandon(number)
            case CarryOver(number):
                self._epochs.carry(number)
            case SwitchTo(number):
                self._epochs.switch(number)
            case ReleaseBefore(number):
                self._epochs.release_before(number)
            case BecomeServing(note):
                self._serve(note)
            case BecomeWaiting(reason):
                log.warning("%s does not go on for now: %s", self.options.model, reason)
                self._outage.begin(running.devices if (running := self._epochs.running) is not None else (), reason)
                if self.yields_to:
                    self.sequences.close(self._moved)
                else:
                    self.sequences.hold(reason)
                self._epochs.failure = self._as_error(reason)
                self._become("waiting", reason)
                self._resolve(self._epochs.failure)
            case GiveUp(reason):
                self._give_up(self._as_error(reason))
            case _:
                assert_never(action)

    def _broken(self, error: BaseException) -> None:
        """What is done in the background failed in a way that nobody foresaw."""
        self._give_up(EngineError(f"{self.options.model}: {type(error).__name__}: {error}"))

    def _give_up(self, error: PeerLLMError) -> None:
        self._finish("failed", error)
        self._work.start("let go", self._epochs.let_go())

    # ---- planning -------------------------------------------------------------------------------------------------

    async def _make_plan(self, asked: MakePlan) -> None:
        running = self._epochs.running
        try:
            await self.model.describe()
            found = await self.plans.find(asked, running, self.sequences.in_flight)
            if self.model.model_dir is None:
                await self.model.fetch()
                found = await self.plans.find(asked, running, self.sequences.in_flight)  # much may have changed
        except PeerLLMError as error:
            self._epochs.failure = error
            contended = isinstance(error, InfeasibleError) and self.plans.contended()
            self._feed(NoPlan(asked.number, str(error), not isinstance(error, PASSING), contended))
            if self.state == "planning" and self.lasting and self._work.current("plan"):
                self._become("waiting", str(error))
            return
        self._feed(found)

    def _serving(self) -> Epoch | None:
        return self._epochs.running if self.state == "serving" else None

    # ---- states ---------------------------------------------------------------------------------------------------

    def _loading(self, epoch: Epoch) -> None:
        """Every device of an epoch has room for it, and begins to load."""
        if self.state != "serving":
            self.report.begin(epoch.blueprint.promises)
            self._become("loading", "")
            self._tell(f"loading on {', '.join(self._around.name(device) for device in epoch.devices)}")

    def _serve(self, note: str) -> None:
        epoch, inspected = self._epochs.running, self.model.inspected
        assert epoch is not None
        assert inspected is not None
        work = epoch.blueprint.workload
        less, began = self._search.served(work), self.state != "serving"
        self._search.free.clear()
        if less:
            log.warning("%s: %s", self.options.name, less)
            self.report.say("serving", less)
        self.lasting = True
        self.took_part.update(epoch.devices)
        if not self._work.going_on("switch"):  # else running answers are not in this epoch yet
            self._outage.over()
        self.idle.served(time.monotonic())
        self._become("serving", "; ".join(filter(None, (less, note))))
        if began:
            self.report.say("serving", f"{self.options.name} is served")
        self.report.begin(())
        self.sequences.open(ServingCapacity(work.sequences, work.context, inspected.vocabulary, inspected.stop_ids))
        self._resolve(None)
        self._served()
        if less and epoch is not self._lessened:
            self._lessened = epoch
            self._feed(ConditionsChanged("it serves less than it did"))  # another device may be here by now

    def _become(self, state: DeploymentState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._around.changed()

    def _finish(self, state: DeploymentState, error: PeerLLMError) -> None:
        self._decisions.close()
        self.state, self.reason = state, str(error)
        self.sequences.close(str(error))
        self._resolve(error)
        self._around.changed()

    def _as_error(self, reason: str) -> PeerLLMError:
        """The error whose text the decider was told, with its class."""
        failure = self._epochs.failure
        return failure if failure is not None and str(failure) == reason else UnavailableError(reason)

    def _resolve(self, error: PeerLLMError | None) -> None:
        waiting, self._outcomes = self._outcomes, []
        for future in waiting:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _tell(self, message: str, share: float | None = None) -> None:
        """Say what is being done, unless it serves meanwhile."""
        if self.state != "serving":
            self.report.say("loading" if self.state == "loading" else "planning", message, share)
