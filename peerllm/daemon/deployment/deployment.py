"""One model's life on its source: what happens goes to its decider, and what that wants done is done here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol, assert_never

from peerllm.daemon.control_messages import DeploymentState, Holding, Progress, Trouble
from peerllm.daemon.decide.assignments import carried
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.decide.deployment_life.deployment_decider import DeploymentDecider
from peerllm.daemon.decide.deployment_life.deployment_events import (
    Abandon,
    Asked,
    BecomeServing,
    BecomeWaiting,
    Carried,
    CarryOver,
    ConditionsChanged,
    DeadlineReached,
    DeploymentAction,
    DeploymentEvent,
    DeviceIs,
    EngineLost,
    Establish,
    Established,
    GiveUp,
    LinksLost,
    MakePlan,
    NoPlan,
    NotEstablished,
    ReleaseBefore,
    Renew,
    Switched,
    SwitchTo,
)
from peerllm.daemon.decide.holdings import HouseholdHoldings
from peerllm.daemon.deployment.admission import Admission, ServingCapacity
from peerllm.daemon.deployment.described_model import DescribedModel, ModelAtHand
from peerllm.daemon.deployment.establishing import DeviceRefusedError, Epoch, EpochNegotiation, failure_of
from peerllm.daemon.deployment.negotiation import Surroundings, carry_all
from peerllm.daemon.deployment.planning.conditions_reader import read_conditions
from peerllm.daemon.deployment.planning.next_plan import NextPlan
from peerllm.daemon.deployment.planning.plan_search import PlanSearch
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.deployment.progress_report import ProgressReport
from peerllm.daemon.deployment.remembered import RememberedDeployment
from peerllm.daemon.deployment.shown_deployment import ShownDeployment
from peerllm.daemon.facade import RunOptions
from peerllm.errors import (
    BadInputError,
    EngineDownError,
    EngineError,
    InfeasibleError,
    LinkError,
    PeerLLMError,
    RefusedError,
    UnavailableError,
)
from peerllm.types import DeviceId

PASSING = (InfeasibleError, RefusedError, LinkError, UnavailableError, EngineError)  # a later try may succeed
EPOCHS_AHEAD = 1000  # a restarted deployment goes on so many after the last epoch that was written down
STALL_LOOK_S = 5.0  # how often it is looked whether answers are stalled

log = logging.getLogger(__name__)


class Decider(Protocol):
    """The pure part: from what happens to what is to be done (decide/deployment_life/deployment_decider.py)."""

    def handle(self, event: DeploymentEvent, now: float) -> list[DeploymentAction]: ...

    def deadline(self) -> float | None: ...


class Deployment:
    """Owned by the coordinator: `start` it, `stop` it; `outcome` waits for the way it goes.

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
        self.sequences = Admission(self.id, around.tell_engine, around.changed)
        self._around, self._served = around, served
        self._search = PlanSearch(options, around, timings, self._tell)
        self._holdings = HouseholdHoldings()
        self.plans = NextPlan(options, around, self._search, self._holdings, self.model)
        self._negotiation = EpochNegotiation(
            around, self.id, self._holdings, self._tell, self._loading, self.plans.loaded
        )
        self.epoch = remembered.epoch + EPOCHS_AHEAD if remembered is not None else 0  # the last number used up
        self._decider = decider(around.me, self.lasting, self.epoch)
        self._events: deque[DeploymentEvent] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._epochs: dict[int, Epoch] = {}  # that stand, or are being established
        self._running: Epoch | None = None  # the one that sequences are computed in
        self._released_before = 0  # epochs before this one were let go of
        self._coming: Epoch | None = None  # the last one that was to be established
        self._lessened: Epoch | None = None  # the last that serves less than an earlier one did
        self._failure: PeerLLMError | None = None  # the last, with its class
        self._outcomes: list[asyncio.Future[None]] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by what they do; one at a time of each
        self._ended = False

    # ---- what the coordinator does with it ----------------------------------------------------------------------

    def start(self, devices: Iterable[DeviceIs], holdings: Mapping[DeviceId, tuple[Holding, ...]]) -> None:
        """`devices`: how each of the household is now; `holdings`: what they have loaded."""
        self._hold(holdings)
        for event in devices:
            self._feed(event)
        self._feed(DeadlineReached())
        self._work("watch", self._watch())
        self._work("watch for stalls", self._watch_stalls())

    async def outcome(self) -> None:
        """Returns when it serves; raises why it does not, now or at the end of the attempt under way."""
        if self.state == "serving":
            return
        if self._ended:
            raise UnavailableError(self.reason or "the deployment has ended")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outcomes.append(future)
        self._feed(Asked())
        await future

    def drain(self, to: str) -> None:
        """Take no new sequences: device `to` goes on with it. Those that run end, where they can go on."""
        self.yields_to = to
        if self.state == "serving":
            self.sequences.refuse(self._moved)
        else:
            self.sequences.close(self._moved)
        self._around.changed()

    async def stop(self, left: bool = False) -> None:
        """End everything, here and on the other devices; `left`: those keep it for the device that goes on."""
        self._finish("stopped", UnavailableError(f"{self.options.model} was stopped"))
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not left:
            await self._let_go()

    def happened(self, event: DeviceIs | ConditionsChanged) -> None:
        """The household changed."""
        self._feed(event)

    def told(self, device: DeviceId, holdings: Iterable[Holding]) -> None:
        """A device says what it has loaded; what it should have for the running epoch and has not is lost."""
        self._holdings.told(device, [one for one in holdings if one.deployment == self.id])
        running = self._running
        if running is not None and self._holdings.promised_in(device, running.number):
            missing = running.layers(device) - self._holdings.layers(device, running.size)
            if missing:
                self._holdings.lost(device)
                name = self._around.name(device)
                self._feed(EngineLost(device, running.number, f"{name} no longer has what it had loaded"))

    def trouble(self, device: DeviceId, told: Trouble) -> None:
        """A device's part of the deployment is lost, or one of its links."""
        epoch = self._epochs.get(told.epoch)
        if epoch is None or device not in epoch.devices:  # of an epoch that is over, or of no device of it
            return
        reason = f"{self._around.name(device)}: {told.reason}"
        if not told.engine_died:
            self._feed(LinksLost(device, told.epoch, reason, told.other))
            return
        if device == self._around.me:
            self.sequences.hold(reason)  # until the next engine has its stages
            self.sequences.engine_lost()
        if self._running is None or self._running.number != told.epoch:  # one that served is the decider's to judge
            self._note_failure(device, told.epoch, EngineError(reason))
        self._holdings.lost(device)
        self._feed(EngineLost(device, told.epoch, reason))

    def progress(self, device: DeviceId, event: Progress) -> None:
        """A device told how far it has fetched or loaded."""
        if self._coming is not None and event.epoch == self._coming.number and self.state == "loading":
            self.report.loaded(device, event)

    @property
    def _moved(self) -> str:
        return f"{self.yields_to} serves {self.options.name} now; ask again"

    @property
    def blueprint(self) -> Blueprint | None:
        """The plan that is loaded or that serves; None while there is none."""
        if self.state == "serving" and self._running is not None:
            return self._running.blueprint
        return self._coming.blueprint if self.state == "loading" and self._coming is not None else None

    def shown(self) -> ShownDeployment:
        """As others see it now."""
        serving = self.state == "serving" and self._running is not None and not self.yields_to
        return ShownDeployment(
            deployment=self.id,
            options=self.options,
            coordinator=self._around.me,
            model=self.model,
            state="stopped" if self.yields_to else self.state,
            reason=f"{self.yields_to} goes on with it" if self.yields_to else self.reason,
            created=self.created,
            epoch=self._running.number if serving and self._running is not None else self.epoch,
            blueprint=self.blueprint,
            message=self.report.message,
            progress=1.0 if serving else self.report.done,
            missing_bytes=getattr(self._failure, "missing_bytes", 0) if self.state == "waiting" else 0,
            succeeds=self.succeeds,
            stays=self.stays,
        )

    async def preview(self, held: Mapping[DeviceId, int]) -> Blueprint:
        """What would be planned now if `held` bytes were free besides; the deployment is not to be started."""
        inspected = await self.model.describe()
        self._search.free = {d: one.free_bytes + held.get(d, 0) for d, one in self._around.candidates().items()}
        return (await self._search.plan(inspected, frozenset())).blueprint

    async def could_run(self, holdings: Mapping[DeviceId, tuple[Holding, ...]]) -> None:
        """Raises why no plan works now for what devices have loaded; the deployment is not to be started."""
        self._hold(holdings)
        await self.model.describe()
        await self.plans.find(MakePlan(0, frozenset(), compare=False), None, ())

    def _hold(self, holdings: Mapping[DeviceId, tuple[Holding, ...]]) -> None:
        for device, told in holdings.items():
            self._holdings.told(device, [one for one in told if one.deployment == self.id])

    # ---- events in, actions out -----------------------------------------------------------------------------------

    def _feed(self, event: DeploymentEvent) -> None:
        """Actions that at once cause events do not interrupt those that come after them."""
        if self._ended:
            return
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                one = self._events.popleft()
                actions = self._decider.handle(one, asyncio.get_running_loop().time())
                if actions:
                    log.debug("%s: %s: %s", self.options.model, one, actions)
                for action in actions:
                    self._do(action)
        finally:
            self._handling = False
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = None if self._ended else self._decider.deadline()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._feed, DeadlineReached())

    def _do(self, action: DeploymentAction) -> None:
        match action:
            case MakePlan():
                if self.state != "serving":
                    self._become("planning", "")
                self._work("plan", self._make_plan(action))
            case Establish(number, plan, first_release):
                make_room = first_release or self._running is None
                self._establish(Epoch(number, self.plans.found(plan)), make_room)
            case Renew(number):
                assert self._running is not None
                self._establish(Epoch(number, self._running.blueprint), make_room=False)
            case Abandon(number):
                self._abandon(number)
            case CarryOver(number):
                self._work("carry", self._carry(self._epochs[number]))
            case SwitchTo(number):
                self._switch(self._epochs[number])
            case ReleaseBefore(number):
                self._release_before(number)
            case BecomeServing(note):
                self._serve(note)
            case BecomeWaiting(reason):
                log.warning("%s does not go on for now: %s", self.options.model, reason)
                if self.yields_to:
                    self.sequences.close(self._moved)
                else:
                    self.sequences.hold(reason)
                self._failure = self._as_error(reason)
                self._become("waiting", reason)
                self._resolve(self._as_error(reason))
            case GiveUp(reason):
                self._finish("failed", self._as_error(reason))
                self._work("let go", self._let_go())
            case _:
                assert_never(action)

    def _work(self, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do it in the background, in place of what is still being done of the same kind."""
        before = self._tasks.pop(what, None)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(work, name=f"{what}: {self.options.model}")
        self._tasks[what] = task
        task.add_done_callback(lambda done: self._worked(what, done))

    def _worked(self, what: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(what) is task:
            del self._tasks[what]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            failed = EngineError(f"{self.options.model}: {type(error).__name__}: {error}")
            self._finish("failed", failed)
            self._work("let go", self._let_go())

    # ---- planning -------------------------------------------------------------------------------------------------

    async def _make_plan(self, asked: MakePlan) -> None:
        running = self._running
        try:
            await self.model.describe()
            found = await self.plans.find(asked, running, self.sequences.in_flight)
            if self.model.model_dir is None:
                await self.model.fetch()
                found = await self.plans.find(asked, running, self.sequences.in_flight)  # much may have changed
        except PeerLLMError as error:
            self._failure = error
            contended = isinstance(error, InfeasibleError) and self.plans.contended()
            self._feed(NoPlan(asked.number, str(error), not isinstance(error, PASSING), contended))
            if self.state == "planning" and self.lasting and self._tasks.get("plan") is asyncio.current_task():
                self._become("waiting", str(error))
            return
        self._feed(found)

    async def _watch(self) -> None:
        def serving() -> Epoch | None:
            return self._running if self.state == "serving" and self.sequences.running else None

        await read_conditions(
            self._around, self.id, serving, self._search.slower, lambda why: self._feed(ConditionsChanged(why))
        )

    async def _watch_stalls(self) -> None:
        """An answer that a stage forgot, or an engine that stands still beside a daemon that lives: links made anew."""
        while True:
            await asyncio.sleep(STALL_LOOK_S)
            if self.state == "serving" and self._running is not None and self.sequences.stalled():
                self._feed(LinksLost(self._around.me, self._running.number, "an answer gets no more tokens"))

    # ---- epochs ---------------------------------------------------------------------------------------------------

    def _establish(self, epoch: Epoch, make_room: bool) -> None:
        self._coming = self._epochs[epoch.number] = epoch
        self.epoch = epoch.number
        self._work("establish", self._established(epoch, make_room))

    def _loading(self, epoch: Epoch) -> None:
        """Every device of an epoch has room for it, and begins to load."""
        if self.state != "serving":
            self.report.begin(epoch.blueprint.promises)
            self._become("loading", "")
            self._tell(f"loading on {', '.join(self._around.name(device) for device in epoch.devices)}")

    async def _established(self, epoch: Epoch, make_room: bool) -> None:
        inspected, me = self.model.inspected, self._around.me
        assert inspected is not None
        try:
            before = () if self._running is None else self._running.blueprint.plan.stages
            await self._negotiation.establish(epoch, inspected, make_room, before)
        except PeerLLMError as error:
            number, devices = epoch.number, epoch.blueprint.promises
            self._work(f"undo {number}", self._negotiation.let_go(number, devices, only=True))
            device, cause = failure_of(error)
            self._failure = EngineError(str(cause)) if device != me and isinstance(cause, BadInputError) else cause
            blamed = self._blamed(device, epoch, error)
            self._epochs.pop(epoch.number, None)
            lasting = device == me and not isinstance(cause, PASSING)
            past = isinstance(error, DeviceRefusedError) and error.past
            self._feed(NotEstablished(epoch.number, blamed, str(cause), lasting, past))
        else:
            self.plans.fetched(epoch)
            self._feed(Established(epoch.number))

    def _blamed(self, device: DeviceId | None, epoch: Epoch, error: PeerLLMError) -> DeviceId | None:
        """The device that the next plan is to do without; None if it can be used for less, or is away."""
        if isinstance(error, DeviceRefusedError):
            if error.away:
                return device
            if error.past:  # it will do for a later one
                return None
            if error.wanted_bytes > error.free_bytes:
                self._search.free[error.device] = error.free_bytes
                return None
            self._note_failure(error.device, epoch.number, UnavailableError(str(error)))
            return device
        cause = failure_of(error)[1]
        if isinstance(cause, EngineDownError):  # its engine crashed and starts again: that is no failure of this plan
            return device
        renewed = self._running is not None and epoch.blueprint is self._running.blueprint
        if (
            device is not None and not isinstance(cause, LinkError) and not renewed
        ):  # else it is away, or tells why itself
            self._note_failure(device, epoch.number, cause)
            return None
        return device

    def _note_failure(self, device: DeviceId, epoch: int, error: PeerLLMError) -> None:
        """The next plan makes less use of the device."""
        known = self._epochs.get(epoch)
        promised = known.blueprint.promises.get(device, 0) if known is not None else 0
        self._search.failed(device, epoch, promised, error)

    def _abandon(self, number: int) -> None:
        for what in ("establish", "carry"):
            task = self._tasks.pop(what, None)
            if task is not None:
                task.cancel()
        epoch = self._epochs.pop(number, None)
        if epoch is not None:
            self._work(f"abandon {number}", self._negotiation.let_go(number, epoch.blueprint.promises, only=True))

    async def _carry(self, epoch: Epoch) -> None:
        before = self._running
        if before is not None and before.size == epoch.size and self.sequences.in_flight:
            stages = (before.number, before.blueprint.plan.stages), (epoch.number, epoch.blueprint.plan.stages)
            await carry_all(self._around, carried(self.id, *stages, self._around.address))
        self._feed(Carried(epoch.number))

    def _switch(self, epoch: Epoch) -> None:
        before, self._running = self._running, epoch
        if before is not None and before.size != epoch.size:
            self.sequences.suspend()  # no slot of the old size is any of the new ones
        try:
            done = self._around.switch(self.id, epoch.number)
        except PeerLLMError as error:
            self._feed(Switched(epoch.number, f"the engine did not switch: {error}"))
        else:
            self._work("switch", self._switched(epoch, done))

    async def _switched(self, epoch: Epoch, done: Awaitable[None]) -> None:
        try:
            await done
        except PeerLLMError as error:
            self._feed(Switched(epoch.number, f"the engine did not switch: {error}"))
            return
        self._feed(Switched(epoch.number))
        if self._running is epoch and self._released_before < epoch.number:
            self._release_before(epoch.number)  # what the decider did not know of, or let go of already

    def _release_before(self, number: int) -> None:
        self._epochs = {one: epoch for one, epoch in self._epochs.items() if one >= number}
        if self._running is not None and self._running.number < number:
            self._running = None
        self._released_before = max(number, self._released_before)
        devices = self._holdings.of_before(number)
        if devices:
            self._work(f"release before {number}", self._negotiation.let_go(number - 1, devices))

    # ---- states ---------------------------------------------------------------------------------------------------

    def _serve(self, note: str) -> None:
        epoch, inspected = self._running, self.model.inspected
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

    async def _let_go(self) -> None:
        """Release everything that this deployment holds on any device."""
        await self._negotiation.let_go(self.epoch, self._holdings.devices)

    def _become(self, state: DeploymentState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._around.changed()

    def _finish(self, state: DeploymentState, error: PeerLLMError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._ended = True
        self.state, self.reason = state, str(error)
        self.sequences.close(str(error))
        self._resolve(error)
        self._around.changed()

    def _as_error(self, reason: str) -> PeerLLMError:
        """The error whose text the decider was told, with its class."""
        failure = self._failure
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
