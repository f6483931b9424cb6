"""Every model of the household as clients see it, whichever device it was started on. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

from peerllm.daemon.control_messages import DeploymentView, DiskModel
from peerllm.daemon.facade import IDLE_MODEL, ModelDetails, ServedModel
from peerllm.daemon.weights.gguf_choice import SUFFIX, quantisation
from peerllm.daemon.weights.known_models import all_names, known_as
from peerllm.types import DeploymentId, DeviceId

MAX_ON_DISK = 512  # models of one device: all that one lists
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
        self._here = self._silent = frozenset[DeviceId]()
        self._asked: dict[DeploymentId, DeviceId] = {}  # who answers for each

    def hear(
        self,
        members: Iterable[DeviceId],
        views: Mapping[DeviceId, Sequence[DeploymentView]],
        silent: Collection[DeviceId] = (),
    ) -> None:
        """`views` are of the devices that are here now, of which some are `silent`.

        Of other members the last ones are kept for AWAITED_S.
        """
        now, kept = self._clock(), frozenset(members)
        self._told = {device: told for device, told in self._told.items() if device in kept}
        self._told |= {device: _Told(now, tuple(deployments)) for device, deployments in views.items()}
        self._here, self._silent = frozenset(views), frozenset(silent)

    def others(self, name: Callable[[DeviceId], str]) -> list[ServedModel]:
        """Models that other devices answer for; of one whose source is away nobody does, and its state is "waiting"."""
        now, found = self._clock(), dict[DeploymentId, dict[DeviceId, tuple[tuple[bool, int], DeploymentView]]]()
        for device, told in self._told.items():
            here = device in self._here
            if here or now - told.at <= AWAITED_S:
                for view in told.deployments:
                    found.setdefault(view.deployment, {})[device] = (here, view.epoch), view
        self._asked = {deployment: self._chosen(deployment, tellers) for deployment, tellers in found.items()}
        chosen = [(device, found[deployment][device][1]) for deployment, device in self._asked.items()]
        return [_model(view, device if device in self._here else "", name(device)) for device, view in chosen]

    def _chosen(
        self, deployment: DeploymentId, tellers: Mapping[DeviceId, tuple[tuple[bool, int], DeploymentView]]
    ) -> DeviceId:
        """Who was asked before, while it is heard; else who is here and has the latest plan.

        A device that had no part in the plan cannot have followed: what it claims gets it no prompts.
        """
        before = self._asked.get(deployment, "")
        if before not in tellers:
            return max(tellers, key=lambda device: tellers[device][0])
        if before in self._here - self._silent:
            return before
        planned = {stage.device for stage in tellers[before][1].stages}
        able = [device for device in tellers if device == before or device in planned or not planned]
        return max(able, key=lambda device: tellers[device][0])


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
        names=all_names(view.name, view.model),
        expires=view.expires if source else 0,
        abilities=view.abilities,
        details=ModelDetails.of(view.family, view.parameters, view.form, view.quantize, view.dtype),
    )


def startable_models(
    running: Iterable[ServedModel], disks: Iterable[tuple[DeviceId, Iterable[DiskModel]]]
) -> list[ServedModel]:
    """The models on the disks of devices, this one's ("") first: each once, and none that runs.

    A device that remembers how a person ran a model is preferred. Then those of both kinds that have been given another
    name, by that name.
    """
    running, told = list(running), [(device, list(islice(models, MAX_ON_DISK))) for device, models in disks]
    seen = set[str]()
    for model in running:
        seen |= {model.name.lower(), *all_names(model.name, model.model)}
    found = list[ServedModel]()
    for asleep in (True, False):
        for device, models in told:
            mine = [one for one in models if one.asleep is asleep and not one.alias]
            fresh = [one for one in mine if seen.isdisjoint(all_names(one.name, one.model))]
            found += [_startable(one, device) for one in fresh]
            seen.update(*(all_names(one.name, one.model) for one in fresh))
    aliases = {one.name: one.model.lower() for _, models in reversed(told) for one in models if one.alias}
    every = [*running, *found]
    for name, meant in aliases.items():
        target = next((one for one in every if meant in (one.model.lower(), one.name.lower(), *one.names)), None)
        if target is not None and name.lower() not in seen:
            found.append(replace(target, name=name, names=frozenset({name.lower()}), alias=True))
    return found


def running_names(models: Iterable[ServedModel]) -> set[str]:
    """In lower case, all that clients may call those that run."""
    running = (one for one in models if one.deployment)
    return {name for one in running for name in (one.name.lower(), one.model.lower(), *one.names)}


def with_asleep(listed: Sequence[DiskModel], asleep: Mapping[str, str]) -> tuple[DiskModel, ...]:
    """What can be started on a device; those that a person ran there (`asleep`: name by model) by the name they had."""
    kept = {one.model: one for one in listed if not one.alias}
    woken = [
        replace(kept.get(model) or DiskModel(name, model, 0, 0), name=name, asleep=True)
        for model, name in asleep.items()
    ]
    return (*woken, *(one for one in listed if one.alias or one.model not in asleep))


@lru_cache(maxsize=1024)
def _startable(one: DiskModel, device: DeviceId) -> ServedModel:
    return ServedModel(
        deployment="",
        name=one.name,
        model=one.model,
        state=IDLE_MODEL,
        reason="",
        created=one.made,
        model_dir=None,
        context=0,
        stop_ids=(),
        source=device,
        names=all_names(one.name, one.model),
        disk_bytes=one.nbytes,
        abilities=one.abilities,
        details=_details(one.model),
    )


def _details(model: str) -> ModelDetails:
    """What its name tells."""
    form = quantisation(model) if model.lower().endswith(SUFFIX) else model.partition(":")[2]
    if (one := known_as(model)) is None:
        return ModelDetails(file_format="gguf" if form else "", level=form)
    form = form or one.form
    return ModelDetails(one.architecture, one.millions * 10**6, "gguf" if form else "safetensors", form)
