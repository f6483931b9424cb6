"""The deployments whose source is this device: started, found, stopped, remembered over a restart."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peerllm.daemon.control_messages import DeploymentView, Holding, Progress, Trouble
from peerllm.daemon.decide.demand import refuse_other, same_demand
from peerllm.daemon.decide.deployment_life.deployment_events import ConditionsChanged, DeviceCondition, DeviceIs
from peerllm.daemon.decide.idle.same_start import same_model
from peerllm.daemon.decide.model_names import name_for
from peerllm.daemon.deployment.deployment import Deployment
from peerllm.daemon.deployment.described_model import DescribedModel, ModelAtHand
from peerllm.daemon.deployment.figures.deployment_figures import DeploymentFigures
from peerllm.daemon.deployment.loading.idle_models import IdleModels, kept_loaded, leavers
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.plan_trial import PlanTrial
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.deployment.remembered import RememberedDeployment, recall, remember
from peerllm.daemon.facade import Chunk, GenerateRequest, RunOptions, RunProgress, ServedModel
from peerllm.daemon.weights.on_disk import DIRECTORIES_FILE, note_directories
from peerllm.engine.messages import TensorAt, Tokens
from peerllm.errors import BadInputError, NotFoundError, PeerLLMError, RefusedError, UnavailableError
from peerllm.types import DeploymentId, DeviceId

MAX_DEPLOYMENTS = 16  # models started on one device at once

log = logging.getLogger(__name__)


class Coordinator:
    """`remembered` is the file that lists what was serving; `start` brings it back. `figures`: of what runs here."""

    def __init__(self, around: Surroundings, remembered: Path) -> None:
        self._around = around
        self._timings = ProfileRequests(around)
        self.figures = DeploymentFigures(around, self._timings, self._find)
        self._file = remembered
        self._deployments: dict[str, Deployment] = {}  # by what `run` was told: a path, a hub id or "builtin"
        self._asleep: dict[str, RunOptions] = {}  # the same of those that a person started and nobody asked for
        self._idle = IdleModels[Deployment](self._deployments.values, self._unload, partial(leavers, around))
        self._devices: dict[DeviceId, DeviceIs] = {}  # how each device of the household is
        self._holdings: dict[DeviceId, tuple[Holding, ...]] = {}  # what each has loaded
        self._remembering: asyncio.Task[None] | None = None
        self._closing = False
        self._writing = asyncio.Lock()

    async def start(self, inherited: Callable[[DeploymentId], ModelAtHand] | None = None) -> None:
        """Bring back the models that were serving when this device last stopped, if nobody else goes on with them.

        `inherited` gives the model of a deployment that this device took over; UnavailableError.
        """
        remembered = await asyncio.to_thread(recall, self._file)
        for one in remembered:
            if one.asleep:
                self._asleep[one.options.model] = one.options
                continue
            if self.elsewhere(one.deployment) or len(self._deployments) >= MAX_DEPLOYMENTS:
                log.info("%s is not started again: another device goes on with it", one.options.name)
                continue
            if one.inherited:
                try:
                    at_hand = (await asyncio.to_thread(inherited, one.inherited)) if inherited is not None else None
                except UnavailableError as error:
                    log.warning("%s is not started again: %s", one.options.name, error)
                    continue
                self._begin(one.options, one, at_hand)
            elif one.options.model not in self._deployments:
                self._begin(one.options, one)
        if len(remembered) > len(self._deployments) + len(self._asleep):
            await self._remember()

    def elsewhere(self, deployment: DeploymentId) -> bool:
        """Whether another device coordinates it, or one that was begun anew for it."""
        return any(deployment in (view.deployment, view.succeeds) for view in self._around.views())

    def take_over(
        self, options: RunOptions, at_hand: ModelAtHand, deployment: DeploymentId, epoch: int, created: int
    ) -> None:
        """Coordinate a deployment of another device from now on, with epochs after `epoch`."""
        remembered = RememberedDeployment(options, deployment, epoch, inherited=deployment)
        self._begin(options, remembered, at_hand, created)
        self._note_served()  # by the one before, which may forget it now

    def serve_anew(
        self,
        options: RunOptions,
        at_hand: ModelAtHand,
        succeeds: DeploymentId,
        created: int,
        devices: tuple[DeviceId, ...],
    ) -> DeploymentId:
        """Serve what another device served, with these `devices`, as a deployment of its own; its id."""
        anew = secrets.token_hex(16)
        remembered = RememberedDeployment(options, anew, 0, inherited=succeeds, succeeds=succeeds, devices=devices)
        self._begin(options, remembered, at_hand, created)
        self._note_served()
        return anew

    async def could_serve(self, options: RunOptions, at_hand: ModelAtHand, deployment: DeploymentId) -> bool:
        """Whether the devices that are here can hold another device's deployment, of which some is loaded already."""
        try:
            await PlanTrial(options, self._around, self._timings, at_hand).could_go_on(deployment, self._holdings)
        except PeerLLMError as error:
            log.info("%s cannot be served from here: %s", options.name, error)
            return False
        return True

    def stay(self, deployment: DeploymentId) -> None:
        """The deployment gives way to no other device that goes on with the same."""
        if (held := self._of(deployment)) is not None:
            held.stays = True
            self._around.changed()

    def drain(self, deployment: DeploymentId, to: str) -> None:
        """The deployment takes no new sequences: device `to` goes on with it; "": it takes them again."""
        if (held := self._of(deployment)) is not None:
            held.drain(to)

    async def give_way(self, deployment: DeploymentId) -> None:
        """Stop coordinating a deployment that another device goes on with."""
        if (held := self._of(deployment)) is not None:
            await self._end(held)
            await self._remember()

    def left(self, deployment: DeploymentId) -> tuple[RunOptions, int, DescribedModel]:
        """What a follower is told of a deployment that runs here, and its model; NotFoundError."""
        held = self._of(deployment)
        if held is None or held.model.inspected is None or held.model.model_dir is None:
            raise NotFoundError("no such deployment runs here")
        return held.options, held.created, held.model

    @property
    def took_part(self) -> dict[DeploymentId, frozenset[DeviceId]]:
        """For each deployment here the devices that had a part in it, also before this device started."""
        return {held.id: frozenset(held.took_part) for held in self._deployments.values()}

    @property
    def streaming(self) -> dict[DeploymentId, bool]:
        """For each deployment here whether sequences of it run or wait."""
        return {held.id: held.sequences.busy for held in self._deployments.values()}

    async def run(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> str:
        """The deployment's name, when it serves; raises why it does not. A model that runs is not started again."""
        options = self._meant(options)
        while (deployment := self._deployments.get(options.model)) is not None and (
            deployment.state == "failed" or self._gives_way(deployment, options)
        ):
            await self._end(deployment)  # somebody else may have started it again meanwhile
        if self._closing:
            raise BadInputError("this device is being stopped")
        if deployment is None:
            if len(self._deployments) >= MAX_DEPLOYMENTS and not await self._idle.one_less():
                raise BadInputError(f"{MAX_DEPLOYMENTS} models run from this device already; stop one first")
            deployment = self._begin(options, None)
        elif not options.on_demand:  # a request takes it as it is
            refuse_other(deployment.options, options)
            deployment.belongs_to_person()
        deployment.report.watchers.append(progress)
        try:
            await deployment.outcome()
        except PeerLLMError:
            if deployment.state == "failed" and self._deployments.get(options.model) is deployment:
                await self._end(deployment)
            raise
        finally:
            deployment.report.watchers.remove(progress)
        self._asleep.pop(options.model, None)
        await self._remember()
        return deployment.options.name

    async def wake(self, model: str) -> str:
        """As `run`, for a request, with the options that a person gave when it was started before.

        It returns, too, if another device starts it at the same moment and goes on with it.
        """
        options = self._asleep.get(model) or RunOptions(model, on_demand=True)
        try:
            if not same_model(model, self._around.views()):
                log.info("%s is started for a request", model)
                return await self.run(options, lambda _: None)
        except UnavailableError:
            if not same_model(model, self._around.views()):
                raise
        return options.name or model

    async def keep(self, deployment: DeploymentId, keep_alive_s: float | None) -> None:
        """A request that says only how long the deployment stays; 0: it is unloaded now, if no answer is under way."""
        if (held := self._of(deployment)) is None:
            return
        now = time.monotonic()
        held.idle.asked(keep_alive_s, now)
        held.idle.over(now)
        if keep_alive_s == 0 and not held.busy and not held.idle.answers:
            await self._unload(held)
        self.look_for_idle()

    async def make_way(self, deployment: DeploymentId) -> None:
        """Unload it, where another device's model needs its memory; RefusedError if somebody uses it."""
        held = self._of(deployment)
        if held is not None and not await self._idle.make_way(held):
            raise RefusedError(f"{held.name} is used")

    def look_for_others(self) -> None:
        """What others say of their deployments changed: of those that requests started here some may give way."""
        self._idle.leave_to(list(self._around.views()))

    def look_for_idle(self) -> None:
        """Unload the models that nobody has asked for so long, now and later."""
        self._idle.look()
        self.look_for_others()
        self._around.changed()

    @property
    def asleep(self) -> list[RunOptions]:
        """What a person started, and was unloaded because nobody asked for it."""
        return list(self._asleep.values())

    async def _unload(self, deployment: Deployment) -> None:
        if not deployment.idle.on_demand and not deployment.inherited:
            self._asleep[deployment.options.model] = deployment.options
        await self._end(deployment)
        await self._remember()

    def _gives_way(self, deployment: Deployment, options: RunOptions) -> bool:
        """Whether it is idle and on demand, and a person wants it in another way."""
        return deployment.makes_way and not options.on_demand and not same_demand(deployment.options, options)

    def _find(self, model: str) -> Deployment | None:
        """By name, path or hub id: no name is another's path."""
        known = (held for held in self._deployments.values() if model in (held.options.name, held.options.model))
        return next(known, None)

    def _meant(self, options: RunOptions) -> RunOptions:
        """The options with the path or hub id of a model that was asked for by its name."""
        held = self._find(options.model)
        known = held.options.model if held is not None else self._asleep_as(options.model)
        return options if known is None else replace(options, model=known)

    async def stop(self, model: str) -> None:
        """NotFoundError if no such model was started here."""
        deployment = self._find(model)
        if deployment is None and (asleep := self._asleep_as(model)) is not None:
            del self._asleep[asleep]
            await self._remember()
            self._around.changed()
            return
        if deployment is None:
            for view in self._around.views():
                if model in (view.name, view.model):
                    name = self._around.name(view.coordinator)
                    raise BadInputError(f"{model} was started on {name}; stop it there")
            raise NotFoundError(f"{model} does not run; `peerllm status` lists what does")
        await self._end(deployment)
        await self._remember()

    def _asleep_as(self, model: str) -> str | None:
        return next((key for key, one in self._asleep.items() if model in (key, one.name)), None)

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if (deployment := self._of(request.deployment)) is None:
            raise NotFoundError("this model is not served any more; `peerllm status` lists what is")
        chunks = deployment.sequences.generate(request)
        return kept_loaded(deployment.idle, request.keep_alive_s, chunks, self.look_for_idle)

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return any(held.sequences.running or held.sequences.queued for held in self._deployments.values())

    def served(self) -> list[ServedModel]:
        return [deployment.shown().served() for deployment in self._deployments.values()]

    def views(self) -> tuple[DeploymentView, ...]:
        return tuple(held.shown().view(held.sequences.measured) for held in self._deployments.values())

    def profiles(self) -> dict[DeploymentId, Mapping[str, Any]]:
        """By deployment the layer times that its last plan was made from, by device name."""
        return {deployment.id: deployment.plans.profiles for deployment in self._deployments.values()}

    def own_tensors(self, deployment: DeploymentId) -> dict[str, TensorAt]:
        """Where the tensors of a deployment lie on this device."""
        held = self._of(deployment)
        return held.model.own_tensors() if held is not None else {}

    # ---- what happens -------------------------------------------------------------------------------------------

    def hear(self, device: DeviceId, message: Progress | Trouble) -> None:
        deployment = self._of(message.deployment)
        if deployment is None:
            return
        if isinstance(message, Progress):
            deployment.progress(device, message)
        else:
            deployment.trouble(device, message)

    def tokens(self, event: Tokens) -> None:
        deployment = self._of(event.deployment)
        if deployment is not None:
            deployment.sequences.hear(event)

    def device_is(self, device: DeviceId, condition: DeviceCondition, reason: str = "", renewed: bool = False) -> None:
        """A device's condition changed; `renewed`: it is reached over another connection than before."""
        known = self._devices.get(device)
        if known is not None and known.condition == condition and not renewed:
            return
        event = DeviceIs(device, condition, f"{self._around.name(device)} {reason}" if reason else "", renewed)
        self._devices[device] = replace(event, renewed=False)
        self._happened(event)

    def told(self, device: DeviceId, holdings: tuple[Holding, ...]) -> None:
        """A device says what it has loaded."""
        self._holdings[device] = holdings
        for deployment in list(self._deployments.values()):
            deployment.told(device, holdings)

    def stir(self, reason: str) -> None:
        """Memory became free, or figures changed: waiting deployments try again, others compare their plans."""
        self._happened(ConditionsChanged(reason))

    def _happened(self, event: DeviceIs | ConditionsChanged) -> None:
        for deployment in list(self._deployments.values()):
            deployment.happened(event)

    async def close(self, left: Callable[[DeploymentId], bool] = lambda _: False) -> None:
        """Stop all deployments; they stay remembered. Other devices keep what they go on with (`left`). Idempotent."""
        self._closing = True
        await self._idle.close()
        deployments = list(self._deployments.values())
        self._deployments.clear()
        await asyncio.gather(*(deployment.stop(left(deployment.id)) for deployment in deployments))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _begin(
        self,
        options: RunOptions,
        remembered: RememberedDeployment | None,
        at_hand: ModelAtHand | None = None,
        created: int = 0,
    ) -> Deployment:
        if at_hand is not None:  # it goes on under the name that clients know
            name = options.name
        elif remembered is not None:  # a name that was taken meanwhile is numbered, not refused
            name = name_for(options.name or options.model, "", self._names())
        else:
            name = name_for(options.model, options.name, self._names())
        options = replace(options, name=name)
        deployment = Deployment(
            options, self._around, self._timings, remembered=remembered, at_hand=at_hand, served=self._note_served
        )
        deployment.created = created or deployment.created
        deployment.plans.make_room = self._idle.make_room
        key = options.model if options.model not in self._deployments else deployment.id
        self._deployments[key] = deployment
        deployment.start(self._devices.values(), self._holdings)
        self._around.changed()
        return deployment

    async def _end(self, deployment: Deployment) -> None:
        for key in [key for key, held in self._deployments.items() if held is deployment]:
            del self._deployments[key]
        await deployment.stop()
        self._around.changed()

    def _names(self) -> dict[str, str]:
        """Every name that a deployment of the household goes by, and the device it was started on."""
        views = [*self._around.views(), *self.views()]
        return {name: self._around.name(view.coordinator) for view in views for name in (view.model, view.name)}

    def _of(self, deployment: DeploymentId) -> Deployment | None:
        return next((held for held in self._deployments.values() if held.id == deployment), None)

    def _note_served(self) -> None:
        """A deployment serves, perhaps in a later epoch than what is written down."""
        self._idle.look()
        self._remembering = asyncio.create_task(self._remember(), name="remember deployments")

    async def _remember(self) -> None:
        async with self._writing:
            if self._closing:
                return
            lasting = [held for held in self._deployments.values() if held.lasting and not held.idle.on_demand]
            remembered = [held.remembered() for held in lasting]
            remembered += [RememberedDeployment(options, "", 0, asleep=True) for options in self._asleep.values()]
            own = [held.options.model for held in lasting if not held.inherited]
            served = [model for model in own if Path(model).is_absolute()]
            try:
                await asyncio.to_thread(note_directories, self._file.with_name(DIRECTORIES_FILE), served)
                await asyncio.to_thread(remember, self._file, remembered)
            except OSError as error:  # the model serves all the same
                log.warning("what runs here cannot be remembered for the next start: %s", error)
