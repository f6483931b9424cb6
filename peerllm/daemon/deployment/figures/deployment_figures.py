"""What people ask of a model that was started here: its plan, its speed, what every device does when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peerllm.daemon.deployment.deployment import Deployment
from peerllm.daemon.deployment.figures.tracing import Traces
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.live_scenario import as_it_runs
from peerllm.daemon.deployment.planning.plan_trial import PlanTrial
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.facade import RunOptions, RunProgress
from peerllm.daemon.facade_objects import MeasuredSpeed, Preview
from peerllm.daemon.status.serving_speed import measured
from peerllm.daemon.status.status import weights_form
from peerllm.errors import BadInputError, NotFoundError, UnavailableError
from peerllm.planner.scenario.scenario_export import scenario_file


class DeploymentFigures:
    """`find` gives a deployment by name, path or hub id."""

    def __init__(
        self, around: Surroundings, timings: ProfileRequests, find: Callable[[str], Deployment | None]
    ) -> None:
        self._around, self._timings, self._find = around, timings, find
        self._traces = Traces(around)

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> Preview:
        """What `run` would plan for now (facade.Household.preview); nothing is reserved or loaded.

        What the same model holds already counts as free.
        """
        running = self._find(options.model)
        if running is not None:  # it was asked for by its name
            options = replace(options, model=running.options.model)
        trial = PlanTrial(
            options, self._around, self._timings, say=lambda what: progress(RunProgress("planning", what))
        )
        held = running.blueprint.promises if running is not None and running.blueprint is not None else {}
        found = await trial.preview(held)
        inspected = await trial.model.describe()
        return {
            "scenario": scenario_file(found.scenario),
            "most_chunk": found.chunk,
            "rounded_layers": list(found.rounded_layers),
            "weights": weights_form(inspected.dtype, inspected.quantize, options.quantize, trial.model.form),
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
    ) -> MeasuredSpeed:
        """Measure how fast it answers, beside whatever else goes on. BadInputError if that does not fit its slots."""
        deployment = self._running(model)
        if deployment.state != "serving" or deployment.blueprint is None or deployment.model.inspected is None:
            raise UnavailableError(f"{model} is {deployment.state}; wait until it serves")
        work = deployment.blueprint.workload
        if sequences > work.sequences or prompt_tokens + output_tokens > work.context:
            room = f"{work.sequences} slots of {work.context} tokens"
            raise BadInputError(f"{model} has {room}; ask for fewer sequences or tokens")
        return await measured(
            deployment.sequences.generate,
            deployment.id,
            deployment.model.inspected.vocabulary,
            sequences=sequences,
            prompt=prompt_tokens,
            output=output_tokens,
            apart=apart,
        )

    async def record(self, model: str) -> int:
        """Make every device of the plan record what it does, until `recorded`; returns the recording's number."""
        deployment = self._running(model)
        if deployment.state != "serving" or deployment.blueprint is None:
            raise UnavailableError(f"{model} is {deployment.state}; wait until it serves")
        return await self._traces.begin(deployment.id, deployment.blueprint)

    async def recorded(self, model: str, number: int) -> bytes:
        """The trace, as the file that chrome://tracing opens. RefusedError if that recording is over."""
        return await self._traces.end(number, self._running(model).id, model)

    def _running(self, model: str) -> Deployment:
        deployment = self._find(model)
        if deployment is None:
            raise NotFoundError(f"{model} does not run from here; `peerllm status` lists what does")
        return deployment
