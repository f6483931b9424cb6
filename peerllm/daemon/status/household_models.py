"""Every model of the household as clients see it, whichever device it was started on. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.facade import ServedModel
from peerllm.types import DeploymentId, DeviceId

AWAITED_S = 60.0  # seconds that a model is still listed, as waiting, after its source was last here


@dataclass(frozen=True, slots=True)
class _Told:
    """What a device said of the deployments that it coordinates, when it was last here."""

    at: float
    deployments: tuple[DeploymentView, ...]


class HouseholdModels:
    """`hear` who is here and what they coordinate; `others` lists it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[DeviceId, _Told] = {}
        self._here: frozenset[DeviceId] = frozenset()

    def hear(self, members: Iterable[DeviceId], views: Mapping[DeviceId, Sequence[DeploymentView]]) -> None:
        """`views` are of the devices that are here now; of other members the last ones are kept for AWAITED_S."""
        now, kept = self._clock(), frozenset(members)
        self._told = {device: told for device, told in self._told.items() if device in kept}
        self._told |= {device: _Told(now, tuple(deployments)) for device, deployments in views.items()}
        self._here = frozenset(views)

    def others(self, name: Callable[[DeviceId], str]) -> list[ServedModel]:
        """Models that other devices answer for; of one whose source is away nobody does, and its state is "waiting"."""
        now, found = self._clock(), dict[DeploymentId, tuple[tuple[bool, int], ServedModel]]()
        for device, told in self._told.items():
            here = device in self._here
            if not here and now - told.at > AWAITED_S:
                continue
            for view in told.deployments:
                rank = here, view.epoch  # of two that tell of it, who is here and has the latest plan
                if view.deployment not in found or rank > found[view.deployment][0]:
                    found[view.deployment] = rank, _model(view, device if here else "", name(device))
        return [model for _, model in found.values()]


def _model(view: DeploymentView, source: DeviceId, name: str) -> ServedModel:
    return ServedModel(
        deployment=view.deployment,
        name=view.name,
        model=view.model,
        state=view.state if source else "waiting",
        reason=view.reason if source else f"{name}, where it was started, is not here",
        created=view.created,
        model_dir=None,
        context=view.context,
        stop_ids=(),
        message=view.message if source else "",
        progress=view.progress if source else 0.0,
        missing_bytes=view.missing_bytes,
        source=source,
    )
