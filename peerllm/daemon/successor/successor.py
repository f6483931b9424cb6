"""This device's part when coordinators are lost and found: what happens goes to its decider, what that wants is done.

The decider is pure (decide/succession/); questions, fetching, loading and answers are here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, assert_never

from peerllm.daemon.control_messages import (
    Answer,
    AnswerCopied,
    AnswerGrew,
    DeploymentView,
    Inherit,
    Vote,
)
from peerllm.daemon.decide.succession.followed_deployment import VOTE_S
from peerllm.daemon.decide.succession.succession_decider import MAX_OF_COORDINATOR, Succession
from peerllm.daemon.decide.succession.succession_events import (
    AskVotes,
    CoordinatedPlan,
    DeploymentOver,
    Drain,
    DrainNoMore,
    Equipped,
    GiveWay,
    Obey,
    ObeyedTold,
    PlanTold,
    Presence,
    PresenceChanged,
    Refuse,
    SeekService,
    ServeAnew,
    ServiceSought,
    Stay,
    StreamsChanged,
    SuccessionAction,
    SuccessionEvent,
    TakeOver,
    TurnCame,
    VoteAsked,
    VoteCame,
)
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.facade import InheritedAnswer
from peerllm.daemon.network import Network
from peerllm.daemon.settings import Settings
from peerllm.daemon.successor.answer_copies import AnswerCopies, HeldCopies, inherited
from peerllm.daemon.successor.equipment import Equipment
from peerllm.daemon.successor.inheritance import Inheritance, InheritedModel, InheritedModels, leave
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.errors import PeerLLMError, RefusedError
from peerllm.types import DeploymentId, DeviceId, Stage

FOLLOWERS = 2  # so many devices of a plan keep ready to follow, in its order
RETURN_S = 2.0  # seconds in which a device that starts hears who goes on with what it served
LEFT, INHERITED = "left", ".inherited"  # folders: what this device leaves to others, what it has of others

log = logging.getLogger(__name__)


class SuccessorParts(Protocol):
    """What is needed of the daemon."""

    settings: Settings
    network: Network
    coordinator: Coordinator
    worker: Worker
    digests: Digests
    store: WeightStore
    home: Home


class Successor:
    """`handler` goes on with answers that others began; the API sets it."""

    def __init__(self, parts: SuccessorParts) -> None:
        self._parts = parts
        self.me: DeviceId = parts.home.me
        self.handler: Callable[[InheritedAnswer], None] | None = None
        self._left = parts.settings.data_dir / LEFT
        self.models = InheritedModels(parts.home.outlines.root / INHERITED, parts.store)
        self._heirs: dict[DeploymentId, tuple[DeviceId, DeploymentId]] = {}  # of deployments that drain
        self.copies = AnswerCopies(parts.network.tell, self._successor, self._heirs.get)
        self._decider = Succession(self.me)
        self._equipment = Equipment(parts.store, self.models, parts.network.ask, self._equipped)
        self._held = HeldCopies()
        self._ready: dict[DeploymentId, set[DeviceId]] = {}  # who has all that it needs to follow this device
        self._stages: dict[DeploymentId, tuple[Stage, ...]] = {}  # of the last plan that each deployment had
        self._told: dict[DeviceId, set[DeploymentId]] = {}  # what each device said that it coordinates
        self._online: set[DeviceId] = set()
        self._lends = True
        self._given_way: set[DeploymentId] = set()  # and not ended here yet
        self._streaming: dict[DeploymentId, bool] = {}
        self._leaving = asyncio.Lock()  # what others follow with is made for one of them at a time
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard = asyncio.Event()  # another device said what it coordinates

    # ---- what happens ---------------------------------------------------------------------------------------------

    @property
    def obeyed(self) -> Mapping[DeploymentId, DeviceId]:
        """As others are told of it."""
        return self._decider.obeyed

    def told(
        self, device: DeviceId, views: Iterable[DeploymentView], obeyed: Mapping[DeploymentId, DeviceId] | None = None
    ) -> None:
        """A device, perhaps this one, says what it coordinates, and another one whom it obeys."""
        self._see_streams()
        ending = self._given_way if device == self.me else ()
        views = [view for view in views if view.coordinator == device and view.deployment not in ending]
        views = views[:MAX_OF_COORDINATOR]
        before, self._told[device] = self._told.get(device, set()), {view.deployment for view in views}
        for over in before - self._told[device]:
            self._feed(DeploymentOver(over, device))
        for view in views:
            stages = view.stages if view.state != "stopped" else ()
            self._feed(PlanTold(self._plan(view, stages or self._stages.get(view.deployment, ()))))
            if stages and self._decider.coordinators.get(view.deployment) == device:  # no other's claim counts
                self._stages[view.deployment] = stages
        if obeyed is not None:
            self._feed(ObeyedTold(device, obeyed))
        self._heard.set()
        self._see_to_equipment()

    def look(self) -> None:
        """Something changed on this device."""
        self.told(self.me, self._parts.coordinator.views())

    def _see_streams(self) -> None:
        streaming = self._parts.coordinator.streaming
        for deployment, busy in streaming.items():
            if busy != self._streaming.get(deployment, False):
                self._feed(StreamsChanged(deployment, busy))
        self._streaming = streaming

    def presence(self, device: DeviceId, presence: Presence, renewed: bool = False) -> None:
        """Another device is heard, silent, or gone; `renewed`: over another connection than before."""
        (self._online.add if presence == "online" else self._online.discard)(device)
        if presence != "online":
            self.copies.again(device)
        self._feed(PresenceChanged(device, presence, renewed))
        self._see_to_equipment()

    def online(self, device: DeviceId) -> bool:
        """Whether another device is heard."""
        return device in self._online

    def lends(self, lends: bool) -> None:
        """Whether this device takes part: one that does not follows in nothing."""
        if lends != self._lends:
            self._lends = lends
            for deployment in self._decider.followed:
                if self._equipment.get(deployment) is not None:
                    self._feed(Equipped(deployment, lends))

    def hear(self, device: DeviceId, message: AnswerCopied | AnswerGrew) -> None:
        """A coordinator tells of answers that this device would go on with, or is to go on with now."""
        if self._decider.coordinators.get(message.deployment) == device:
            self._held.hear(device, message)
        elif isinstance(message, AnswerCopied) and self._decider.hands_over(message.deployment, device):
            self._hand_on(inherited(message))

    async def answer(self, device: DeviceId, question: Inherit | Vote) -> Answer:
        """Raises what stands against it."""
        match question:
            case Vote(plan, term):
                (action,) = self._feed(VoteAsked(device, plan, term))
                if isinstance(action, Refuse):
                    raise RefusedError(action.reason)
                return Answer(0)
            case Inherit(deployment, complete):
                return await self._leave(device, deployment, complete)

    async def others_heard(self) -> None:
        """Returns when all other devices that are here said what they coordinate, or after a bounded time."""
        try:
            async with asyncio.timeout(RETURN_S):
                while self._parts.network.peers().keys() - self._told.keys():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            pass

    def goes_on(self, deployment: DeploymentId) -> bool:
        """Whether another device can go on with a deployment that this one coordinates."""
        return self._successor(deployment) is not None

    async def close(self) -> None:
        """May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
        self.copies.close()
        await self._equipment.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- events in, actions out -----------------------------------------------------------------------------------

    def _feed(self, event: SuccessionEvent) -> list[SuccessionAction]:
        actions = self._decider.handle(event, asyncio.get_running_loop().time())
        for deployment, coordinator in self._decider.coordinators.items():
            self._parts.worker.obey(deployment, coordinator)
        for action in actions:
            self._do(action)
        self._set_timer()
        return actions

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._decider.deadline()
        self._timer = asyncio.get_running_loop().call_at(due, self._feed, TurnCame()) if due is not None else None

    def _do(self, action: SuccessionAction) -> None:
        name = self._parts.home.name
        match action:
            case SeekService(deployment):
                self._spawn(self._seek_service(deployment), "seek service")
            case AskVotes(plan, term, devices):
                log.info("%s is lost; asking to go on with %s", name(plan.coordinator), plan.deployment[:8])
                for device in devices:
                    self._spawn(self._ask_vote(device, plan, term), "ask for a vote")
            case TakeOver(deployment, epoch):
                log.warning("this device goes on with %s", deployment[:8])
                self._take_over(deployment, epoch)
            case ServeAnew(deployment):
                self._spawn(self._serve_anew(deployment), "serve anew")
            case Stay(deployment):
                self._parts.coordinator.stay(deployment)
            case Drain(deployment, to, other):
                self._heirs[deployment] = to, other
                self._parts.coordinator.drain(deployment, name(to))
            case DrainNoMore(deployment):
                self._heirs.pop(deployment, None)
                self._parts.coordinator.drain(deployment, "")
            case GiveWay(deployment, to):
                log.warning("%s goes on with %s", name(to), deployment[:8])
                self._given_way.add(deployment)
                self._spawn(self._give_way(deployment), "give way")
            case Obey() | Refuse():
                pass  # the answer to who asked
            case _:
                assert_never(action)

    async def _ask_vote(self, device: DeviceId, plan: CoordinatedPlan, term: int) -> None:
        try:
            await self._parts.network.ask(device, Vote(plan, term), VOTE_S)
        except PeerLLMError as error:
            log.info("%s does not vote for this device: %s", self._parts.home.name(device), error)
            granted = False
        else:
            granted = True
        self._feed(VoteCame(device, plan.deployment, term, granted))

    async def _seek_service(self, deployment: DeploymentId) -> None:
        inherited = self._inherited(deployment)
        options, at_hand = inherited.inheritance.options, inherited.at_hand
        feasible = await self._parts.coordinator.could_serve(options, at_hand, deployment)
        self._feed(ServiceSought(deployment, feasible))

    def _take_over(self, deployment: DeploymentId, epoch: int) -> None:
        inherited = self._inherited(deployment)
        options, created = inherited.inheritance.options, inherited.inheritance.created
        self._parts.coordinator.take_over(options, inherited.at_hand, deployment, epoch, created)
        self._go_on(deployment, deployment)

    async def _serve_anew(self, deployment: DeploymentId) -> None:
        """What this device holds of the lost deployment makes room for it."""
        inherited = self._inherited(deployment)
        options, created = inherited.inheritance.options, inherited.inheritance.created
        await self._parts.worker.let_go(deployment)
        devices = tuple(dict.fromkeys(stage.device for stage in self._stages.get(deployment, ())))
        anew = self._parts.coordinator.serve_anew(options, inherited.at_hand, deployment, created, devices)
        self._go_on(deployment, anew)

    def _inherited(self, deployment: DeploymentId) -> InheritedModel:
        """What a source needs of it. This device's own shards are known to it as the others' are."""
        self._parts.coordinator.told(self.me, self._parts.worker.holdings())
        model = self._equipment.get(deployment)
        assert model is not None
        return model

    async def _give_way(self, deployment: DeploymentId) -> None:
        """First of all of what is loaded: soon the other may load its own here."""
        try:
            await self._parts.worker.let_go(deployment)
            await self._parts.coordinator.give_way(deployment)
        finally:
            self._given_way.discard(deployment)
            self._heirs.pop(deployment, None)

    def _go_on(self, deployment: DeploymentId, to: DeploymentId) -> None:
        """With the answers under way that have a key."""
        for answer in self._held.take(deployment, to):
            self._hand_on(answer)

    def _hand_on(self, answer: InheritedAnswer) -> None:
        if self.handler is not None:
            self.handler(answer)

    # ---- this device follows others ---------------------------------------------------------------------------------

    def _plan(self, view: DeploymentView, stages: Iterable[Stage]) -> CoordinatedPlan:
        """As it is told; what has no stages now keeps the devices that it had: `stages`, or those before a restart."""
        devices = [stage.device for stage in stages]
        if not devices and view.coordinator == self.me:
            devices = sorted(self._parts.coordinator.took_part.get(view.deployment, ()))
        serving = view.state == "serving"
        return CoordinatedPlan(
            view.deployment,
            view.coordinator,
            tuple(dict.fromkeys(devices)),
            view.epoch,
            serving,
            view.succeeds,
            view.stays,
        )

    def _see_to_equipment(self) -> None:
        followed = self._decider.followed
        for deployment, plan in followed.items():
            stages = self._stages.get(deployment, ())
            behind = [device for device in plan.devices if device != plan.coordinator]
            if self.me in behind[:FOLLOWERS] and plan.coordinator in self._online:
                if plan.serving:
                    others = (stage for stage in stages if stage.device != plan.coordinator)
                    layers = frozenset(i for one in others for i in range(one.first_layer, one.last_layer + 1))
                    self._equipment.follow(deployment, (plan.coordinator, layers))
            else:
                self._equipment.pause(deployment)
        known = followed.keys() | self._decider.coordinators.keys()
        for deployment in self._stages.keys() - known:
            del self._stages[deployment]
            self._equipment.forget(deployment)
            self._ready.pop(deployment, None)
            self._feed(Equipped(deployment, complete=False))
            self._held.forget(deployment)

    def _equipped(self, deployment: DeploymentId) -> None:
        log.info("this device can follow in %s", deployment[:8])
        self._feed(Equipped(deployment, self._lends))

    # ---- others follow this device ----------------------------------------------------------------------------------

    async def _leave(self, device: DeviceId, deployment: DeploymentId, complete: bool) -> Answer:
        if device not in {stage.device for stage in self._stages.get(deployment, ())}:
            raise RefusedError("only a device of its plan follows in a deployment")
        options, created, model = self._parts.coordinator.left(deployment)
        if complete:
            self._ready.setdefault(deployment, set()).add(device)
            return Answer(0)
        assert model.inspected is not None
        assert model.model_dir is not None
        parts, inheritance = self._parts, Inheritance(options, created, model.form, model.inspected, {})
        place: Path = self._left / deployment
        async with self._leaving:  # a large manifest takes a second to be written
            files = await leave(
                parts.home, parts.digests, place, inheritance, model.model_dir, partial(parts.network.kept_busy, device)
            )
        return Answer(0, inherited=files)

    def _successor(self, deployment: DeploymentId) -> DeviceId | None:
        """The first device of the plan that is ready to follow this one."""
        ready = self._ready.get(deployment, set()) & self._online
        return next((stage.device for stage in self._stages.get(deployment, ()) if stage.device in ready), None)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())
