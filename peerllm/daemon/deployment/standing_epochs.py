"""The epochs of one deployment: established, switched to and let go of, as its decider wants it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from peerllm.daemon.background_tasks import LatestTasks
from peerllm.daemon.control_messages import Holding, Trouble
from peerllm.daemon.decide.assignments import carried
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.decide.deployment_life.deployment_events import (
    Carried,
    DeploymentEvent,
    EngineLost,
    Established,
    LinksLost,
    NotEstablished,
    Switched,
)
from peerllm.daemon.deployment.described_model import DescribedModel
from peerllm.daemon.deployment.establishing import DeviceRefusedError, Epoch, EpochNegotiation, failure_of
from peerllm.daemon.deployment.negotiation import Surroundings, carry_all
from peerllm.daemon.deployment.planning.next_plan import NextPlan
from peerllm.daemon.deployment.sequences.admission import Admission
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
from peerllm.types import DeploymentId, DeviceId

PASSING = (InfeasibleError, RefusedError, LinkError, UnavailableError, EngineError)  # a later try may succeed


class StandingEpochs:
    """Each call begins something; how it ends is told to `feed` as an event.

    `running` is the epoch that sequences are computed in, `coming` the last that was to be established. `failure` says
    why there is no plan, or no epoch of it.
    """

    def __init__(
        self,
        deployment: DeploymentId,
        last: int,
        around: Surroundings,
        model: DescribedModel,
        sequences: Admission,
        plans: NextPlan,
        negotiation: EpochNegotiation,
        work: LatestTasks,
        feed: Callable[[DeploymentEvent], None],
    ) -> None:
        self._deployment, self.last = deployment, last  # the last number used up
        self._around, self._model, self._sequences = around, model, sequences
        self._plans, self._search = plans, plans.search
        self._negotiation, self._holdings = negotiation, negotiation.holdings
        self._work, self._feed = work, feed
        self._epochs: dict[int, Epoch] = {}  # that stand, or are being established
        self.running: Epoch | None = None
        self.coming: Epoch | None = None
        self.failure: PeerLLMError | None = None
        self._released_before = 0  # epochs before this one were let go of

    # ---- what the decider wants done ------------------------------------------------------------------------------

    def establish(self, number: int, blueprint: Blueprint, first_release: bool = False) -> None:
        """Load and link an epoch; `first_release`: what stands makes room for it. Ends as [Not]Established."""
        make_room = first_release or self.running is None
        epoch = self.coming = self._epochs[number] = Epoch(number, blueprint)
        self.last = number
        self._work.start("establish", self._establish(epoch, make_room))

    def abandon(self, number: int) -> None:
        """Let go of an epoch that is not switched to."""
        for kind in ("establish", "carry"):
            self._work.cancel(kind)
        if (epoch := self._epochs.pop(number, None)) is not None:
            let_go = self._negotiation.let_go(number, epoch.blueprint.promises, only=True)
            self._work.start(f"abandon {number}", let_go)

    def carry(self, number: int) -> None:
        """Copy what running sequences keep to where that epoch needs it. Ends as Carried."""
        self._work.start("carry", self._carry(self._epochs[number]))

    def switch(self, number: int) -> None:
        """Sequences run in that epoch from now on. Ends as Switched."""
        epoch = self._epochs[number]
        before, self.running = self.running, epoch
        if before is not None and before.size != epoch.size:
            self._sequences.suspend()  # no slot of the old size is any of the new ones
        try:
            done = self._around.switch(self._deployment, number)
        except PeerLLMError as error:
            self._feed(Switched(number, f"the engine did not switch: {error}"))
        else:
            self._work.start("switch", self._switched(epoch, done))

    def release_before(self, number: int) -> None:
        """Let go of all epochs before that one."""
        self._epochs = {one: epoch for one, epoch in self._epochs.items() if one >= number}
        if self.running is not None and self.running.number < number:
            self.running = None
        self._released_before = max(number, self._released_before)
        devices = self._holdings.of_before(number)
        if devices:
            self._work.start(f"release before {number}", self._negotiation.let_go(number - 1, devices))

    async def let_go(self) -> None:
        """Release everything that this deployment holds on any device."""
        await self._negotiation.let_go(self.last, self._holdings.devices)

    # ---- what devices tell ----------------------------------------------------------------------------------------

    def told(self, device: DeviceId, holdings: list[Holding]) -> None:
        """A device says what it has loaded; what it should have for the running epoch and has not is lost."""
        self._holdings.told(device, holdings)
        running = self.running
        if running is not None and self._holdings.promised_in(device, running.number):
            missing = running.layers(device) - self._holdings.layers(device, running.size)
            if missing:
                self._holdings.lost(device)
                name = self._around.name(device)
                self._feed(EngineLost(device, running.number, f"{name} no longer has what it had loaded"))

    def trouble(self, device: DeviceId, told: Trouble) -> None:
        """A device's part of an epoch is lost, or one of its links."""
        epoch = self._epochs.get(told.epoch)
        if epoch is None or device not in epoch.devices:  # of an epoch that is over, or of no device of it
            return
        reason = f"{self._around.name(device)}: {told.reason}"
        if not told.engine_died:
            self._feed(LinksLost(device, told.epoch, reason, told.other))
            return
        if device == self._around.me:
            self._sequences.hold(reason)  # until the next engine has its stages
            self._sequences.engine_lost()
        if self.running is None or self.running.number != told.epoch:  # one that served is the decider's to judge
            self._note_failure(device, epoch, EngineError(reason))
        self._holdings.lost(device)
        self._feed(EngineLost(device, told.epoch, reason))

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _establish(self, epoch: Epoch, make_room: bool) -> None:
        inspected, me = self._model.inspected, self._around.me
        assert inspected is not None
        try:
            before = () if self.running is None else self.running.blueprint.plan.stages
            await self._negotiation.establish(epoch, inspected, make_room, before)
        except PeerLLMError as error:
            let_go = self._negotiation.let_go(epoch.number, epoch.blueprint.promises, only=True)
            self._work.start(f"undo {epoch.number}", let_go)
            device, cause = failure_of(error)
            self.failure = EngineError(str(cause)) if device != me and isinstance(cause, BadInputError) else cause
            blamed = self._blamed(device, epoch, error)
            self._epochs.pop(epoch.number, None)
            lasting = device == me and not isinstance(cause, PASSING)
            past = isinstance(error, DeviceRefusedError) and error.past
            self._feed(NotEstablished(epoch.number, blamed, str(cause), lasting, past))
        else:
            self._plans.fetched(epoch)
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
            self._note_failure(error.device, epoch, UnavailableError(str(error)))
            return device
        cause = failure_of(error)[1]
        if isinstance(cause, EngineDownError):  # its engine crashed and starts again: that is no failure of this plan
            return device
        renewed = self.running is not None and epoch.blueprint is self.running.blueprint
        if device is None or isinstance(cause, LinkError) or renewed:  # it is away, or tells why itself
            return device
        self._note_failure(device, epoch, cause)
        return None

    def _note_failure(self, device: DeviceId, epoch: Epoch, error: PeerLLMError) -> None:
        """The next plan makes less use of the device."""
        self._search.failed(device, epoch.number, epoch.blueprint.promises.get(device, 0), error)

    async def _carry(self, epoch: Epoch) -> None:
        before = self.running
        if before is not None and before.size == epoch.size and self._sequences.in_flight:
            stages = (before.number, before.blueprint.plan.stages), (epoch.number, epoch.blueprint.plan.stages)
            await carry_all(self._around, carried(self._deployment, *stages, self._around.address))
        self._feed(Carried(epoch.number))

    async def _switched(self, epoch: Epoch, done: Awaitable[None]) -> None:
        try:
            await done
        except PeerLLMError as error:
            self._feed(Switched(epoch.number, f"the engine did not switch: {error}"))
            return
        self._feed(Switched(epoch.number))
        if self.running is epoch and self._released_before < epoch.number:
            self.release_before(epoch.number)  # what the decider did not know of, or let go of already
