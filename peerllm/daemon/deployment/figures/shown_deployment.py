"""A deployment as others see it: the household in `status`, and the API of this device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from peerllm.daemon.control_messages import DeploymentState, DeploymentView
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.deployment.described_model import DescribedModel
from peerllm.daemon.facade import ModelDetails, RunOptions, ServedModel
from peerllm.daemon.weights.known_models import all_names
from peerllm.types import DeploymentId, DeviceId


@dataclass(frozen=True, slots=True)
class ShownDeployment:
    """What is told of it now; `blueprint` is the plan that serves or is being loaded."""

    deployment: DeploymentId
    options: RunOptions
    coordinator: DeviceId
    model: DescribedModel
    state: DeploymentState
    reason: str
    created: int
    epoch: int
    blueprint: Blueprint | None
    message: str
    progress: float
    missing_bytes: int
    succeeds: DeploymentId = ""
    stays: bool = False
    expires: int = 0
    idle_since: int = 0

    def view(self, measured: dict[str, float]) -> DeploymentView:
        """For every device of the household; no text, no token ids."""
        blueprint, inspected, options = self.blueprint, self.model.inspected, self.options
        plan = blueprint.plan if blueprint is not None else None
        return DeploymentView(
            deployment=self.deployment,
            model=options.model,
            name=options.name,
            context=self._context,
            message=self.message,
            state=self.state,
            epoch=self.epoch,
            coordinator=self.coordinator,
            stages=plan.stages if plan is not None else (),
            stage_memory_bytes=blueprint.stage_memory_bytes if blueprint is not None else (),
            predicted=asdict(plan.predicted) if plan is not None else {},
            measured=measured,
            reason=self.reason,
            progress=self.progress,
            slots=blueprint.workload.sequences if blueprint is not None else 0,
            schedule=options.schedule,
            activations=blueprint.activations if blueprint is not None else (),
            activations_wanted=options.activations,
            dtype=inspected.dtype if inspected is not None else "",
            quantize=inspected.quantize if inspected is not None else "",
            quantize_wanted=options.quantize,
            form=self.model.form,
            created=self.created,
            missing_bytes=max(0, self.missing_bytes),
            succeeds=self.succeeds,
            stays=self.stays,
            expires=self.expires,
            abilities=self.model.abilities,
            idle_since=self.idle_since,
            on_demand=options.on_demand,
            family=inspected.architecture if inspected is not None else "",
            parameters=self.model.parameters,
        )

    def served(self) -> ServedModel:
        """For this device's API."""
        inspected, details = self.model.inspected, ModelDetails()
        if inspected is not None:
            about = self.model.form, inspected.quantize, inspected.dtype
            details = ModelDetails.of(inspected.architecture, self.model.parameters, *about)
        return ServedModel(
            deployment=self.deployment,
            name=self.options.name,
            model=self.options.model,
            state=self.state,
            reason=self.reason,
            created=self.created,
            model_dir=self.model.model_dir,
            context=self._context,
            stop_ids=inspected.stop_ids if inspected is not None else (),
            message=self.message,
            progress=self.progress,
            missing_bytes=self.missing_bytes,
            names=all_names(self.options.name, self.options.model),
            expires=self.expires,
            abilities=self.model.abilities,
            details=details,
        )

    @property
    def _context(self) -> int:
        return self.blueprint.workload.context if self.blueprint is not None else 0
