"""The deployments whose source is this device: started, found, stopped, remembered over a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import DeploymentView, Progress, Trouble
from peerllm.daemon.decide.model_names import name_for
from peerllm.daemon.deployment.deployment import Deployment, refuse_other
from peerllm.daemon.deployment.live_scenario import as_it_runs
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.profile_requests import ProfileRequests
from peerllm.daemon.deployment.tracing import Traces
from peerllm.daemon.facade import Chunk, GenerateRequest, RunOptions, RunProgress, ServedModel
from peerllm.daemon.status.serving_speed import measured
from peerllm.daemon.status.status import weights_form
from peerllm.daemon.weights.on_disk import DIRECTORIES_FILE, note_directories
from peerllm.engine.messages import TensorAt, Tokens
from peerllm.errors import BadInputError, LinkError, NotFoundError, PeerLLMError, UnavailableError
from peerllm.planner.scenario.scenario_export import scenario_file
from peerllm.saved_files import replace_file
from peerllm.types import DeploymentId, DeviceId

MAX_DEPLOYMENTS = 16  # models started on one device at once

log = logging.getLogger(__name__)


class Coordinator:
    """`remembered` is the file that lists what was serving; `start` brings it back."""

    def __init__(self, around: Surroundings, remembered: Path) -> None:
        self._around = around
        self._timings = ProfileRequests(around)
        self._traces = Traces(around)
        self._file = remembered
        self._deployments: dict[str, Deployment] = {}  # by what `run` was told: a path, a hub id or "builtin"
        self._closing = False
        self._writing = asyncio.Lock()

    async def start(self) -> None:
        """Bring back the models that were serving when this device last stopped."""
        for options in await asyncio.to_thread(_read, self._file):
            if options.model not in self._deployments and len(self._deployments) < MAX_DEPLOYMENTS:
                self._begin(options, remembered=True)

    async def run(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> str:
        """The deployment's name, when it serves; raises why it does not. A model that runs is not started again."""
        options = self._meant(options)
        while (deployment := self._deployments.get(options.model)) is not None and deployment.state == "failed":
            await self._end(deployment)  # somebody else may have started it again meanwhile
        if self._closing:
            raise BadInputError("this device is being stopped")
        if deployment is None:
            if len(self._deployments) >= MAX_DEPLOYMENTS:
                raise BadInputError(f"{MAX_DEPLOYMENTS} models run from this device already; stop one first")
            deployment = self._begin(options, remembered=False)
        else:
            refuse_other(deployment.options, options)
        deployment.watchers.append(progress)
        try:
            await deployment.outcome()
        except PeerLLMError:
            if deployment.state == "failed" and self._deployments.get(options.model) is deployment:
                await self._end(deployment)
            raise
        finally:
            deployment.watchers.remove(progress)
        await self._remember()
        return deployment.options.name

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> dict[str, Any]:
        """What `run` would plan for now (facade.Household.preview); nothing is reserved or loaded.

        What the same model holds already counts as free.
        """
        options = self._meant(options)
        deployment = Deployment(options, self._around, self._timings, False)
        deployment.watchers.append(progress)
        running = self._deployments.get(options.model)
        held = running.blueprint.promises if running is not None and running.blueprint is not None else {}
        found, view = await deployment.preview(held), deployment.view()
        return {
            "scenario": scenario_file(found.scenario),
            "most_chunk": found.chunk,
            "rounded_layers": list(found.rounded_layers),
            "weights": weights_form(view),
        }

    async def scenario(self, model: str) -> dict[str, Any]:
        """What a running deployment was planned for, and its plan; "running" is that with all times as of now.

        NotFoundError if none was started here.
        """
        deployment = self._running(model)
        blueprint = deployment.blueprint
        if blueprint is None:
            raise UnavailableError(f"{model} has no plan yet")
        return await as_it_runs(self._around, deployment.id, blueprint)

    async def bench(
        self, model: str, sequences: int, prompt_tokens: int, output_tokens: int, apart: bool = False
    ) -> dict[str, Any]:
        """Measured now, beside whatever else goes on. BadInputError if it does not fit the deployment's slots."""
        deployment = self._running(model)
        if deployment.state != "serving" or deployment.blueprint is None or deployment.inspected is None:
            raise UnavailableError(f"{model} is {deployment.state}; wait until it serves")
        work = deployment.blueprint.workload
        if sequences > work.sequences or prompt_tokens + output_tokens > work.context:
            room = f"{work.sequences} slots of {work.context} tokens"
            raise BadInputError(f"{model} has {room}; ask for fewer sequences or tokens")
        return await measured(
            deployment.sequences.generate,
            deployment.id,
            deployment.inspected.vocabulary,
            sequences=sequences,
            prompt=prompt_tokens,
            output=output_tokens,
            apart=apart,
        )

    async def record(self, model: str) -> int:
        """Every device of the plan records what it does, until `recorded`; the recording's number."""
        deployment = self._running(model)
        if deployment.state != "serving" or deployment.blueprint is None:
            raise UnavailableError(f"{model} is {deployment.state}; wait until it serves")
        return await self._traces.begin(deployment.id, deployment.blueprint)

    async def recorded(self, model: str, number: int) -> bytes:
        """The trace, as the file that chrome://tracing opens. RefusedError if that recording is over."""
        return await self._traces.end(number, self._running(model).id, model)

    def _find(self, model: str) -> Deployment | None:
        """By name, path or hub id: no name is another's path."""
        known = (held for held in self._deployments.values() if model in (held.options.name, held.options.model))
        return next(known, None)

    def _meant(self, options: RunOptions) -> RunOptions:
        """The options with the path or hub id of a model that was asked for by its name."""
        held = self._find(options.model)
        return options if held is None else replace(options, model=held.options.model)

    def _running(self, model: str) -> Deployment:
        deployment = self._find(model)
        if deployment is None:
            raise NotFoundError(f"{model} does not run from here; `peerllm status` lists what does")
        return deployment

    async def stop(self, model: str) -> None:
        """NotFoundError if no such model was started here."""
        deployment = self._find(model)
        if deployment is None:
            for view in self._around.views():
                if model in (view.name, view.model):
                    name = self._around.name(view.coordinator)
                    raise BadInputError(f"{model} was started on {name}; stop it there")
            raise NotFoundError(f"{model} does not run; `peerllm status` lists what does")
        await self._end(deployment)
        await self._remember()

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        deployment = self._of(request.deployment)
        if deployment is None:
            raise NotFoundError("this model is not served any more; `peerllm status` lists what is")
        return deployment.sequences.generate(request)

    @property
    def busy(self) -> bool:
        """Whether any sequence runs or waits."""
        return any(held.sequences.running or held.sequences.queued for held in self._deployments.values())

    def served(self) -> list[ServedModel]:
        return [deployment.served() for deployment in self._deployments.values()]

    def views(self) -> tuple[DeploymentView, ...]:
        return tuple(deployment.view() for deployment in self._deployments.values())

    def profiles(self) -> dict[DeploymentId, Mapping[str, Any]]:
        """What the plans made here went by: device name to its layer times."""
        return {deployment.id: deployment.profiles for deployment in self._deployments.values()}

    def own_tensors(self, deployment: DeploymentId) -> dict[str, TensorAt]:
        """Where the tensors of a deployment lie on this device."""
        held = self._of(deployment)
        return held.own_tensors() if held is not None else {}

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

    def gone(self, device: DeviceId, reason: str) -> None:
        for deployment in self._deployments.values():
            deployment.gone(device, reason)

    def stir(self) -> None:
        """A device came, or memory became free: waiting deployments try again."""
        for deployment in self._deployments.values():
            deployment.stir()

    async def close(self) -> None:
        """Stop all deployments; they stay remembered. May be called twice."""
        self._closing = True
        deployments = list(self._deployments.values())
        self._deployments.clear()
        await asyncio.gather(*(deployment.stop() for deployment in deployments))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _begin(self, options: RunOptions, remembered: bool) -> Deployment:
        if remembered:  # a name that was taken meanwhile is numbered, not refused
            name = name_for(options.name or options.model, "", self._names())
        else:
            name = name_for(options.model, options.name, self._names())
        options = replace(options, name=name)
        deployment = self._deployments[options.model] = Deployment(options, self._around, self._timings, remembered)
        deployment.start()
        self._around.changed()
        return deployment

    async def _end(self, deployment: Deployment) -> None:
        if self._deployments.get(deployment.options.model) is deployment:
            del self._deployments[deployment.options.model]
        await deployment.stop()
        self._around.changed()

    def _names(self) -> dict[str, str]:
        """Every name that a deployment of the household goes by, and the device it was started on."""
        views = [*self._around.views(), *self.views()]
        return {name: self._around.name(view.coordinator) for view in views for name in (view.model, view.name)}

    def _of(self, deployment: DeploymentId) -> Deployment | None:
        return next((held for held in self._deployments.values() if held.id == deployment), None)

    async def _remember(self) -> None:
        async with self._writing:
            if self._closing:
                return
            options = [held.options for held in self._deployments.values() if held.lasting]
            served = [one.model for one in options if Path(one.model).is_absolute()]
            try:
                await asyncio.to_thread(note_directories, self._file.with_name(DIRECTORIES_FILE), served)
                await asyncio.to_thread(_write, self._file, options)
            except OSError as error:  # the model serves all the same
                log.warning("what runs here cannot be remembered for the next start: %s", error)


def _read(file: Path) -> list[RunOptions]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    result = []
    for line in lines[:MAX_DEPLOYMENTS]:
        try:
            result.append(decode(line, RunOptions))
        except LinkError as error:
            log.warning("%s: a line was skipped: %s", file, error)
    return result


def _write(file: Path, options: list[RunOptions]) -> None:
    replace_file(file, b"".join(encode(one, RunOptions) + b"\n" for one in options))
