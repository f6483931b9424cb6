"""A running deployment as a scenario for the planner: as it was planned, and with the times measured since."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, replace
from typing import Any

from peerllm.daemon.control_messages import Pace
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.decide.device_profiles import checked, link_profiles
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.errors import PeerLLMError
from peerllm.planner.cost.observed_times import Points, with_observed_times
from peerllm.planner.scenario.scenario_export import names_in, scenario_file
from peerllm.types import DeploymentId

PACE_TIMEOUT_S = 5.0
MAX_SPREAD = 3.0  # a device whose passes vary more tells nonsense

_Told = dict[int, Points]  # by place in the plan

log = logging.getLogger(__name__)


async def as_it_runs(around: Surroundings, deployment: DeploymentId, blueprint: Blueprint) -> dict[str, Any]:
    """Scenario files: "scenario", what was planned for, and "running"; beside them the plan and its stages' paces."""
    planned = blueprint.scenario
    names = names_in(planned.devices)
    candidates, links = around.candidates(), dict(planned.links)
    if all(device in candidates for device in names):
        now = link_profiles(candidates, around.me)
        links = {pair: now.get(pair, link) for pair, link in links.items()}
    paces, spreads = await stage_paces(around, deployment, blueprint)
    running = replace(
        planned, links=links, devices=with_observed_times(planned.model, planned.devices, blueprint.plan.stages, paces)
    )
    return {
        "scenario": scenario_file(planned),
        "running": scenario_file(running),
        "paces": _by_place(paces),
        "spreads": _by_place(spreads),
        "stages": [{**asdict(stage), "device": names[stage.device]} for stage in blueprint.plan.stages],
        "micro_batch": blueprint.micro_batch,
        "micro_batches": blueprint.micro_batches,
        "schedule": blueprint.schedule,
        "cuts": blueprint.cuts,
    }


async def stage_paces(around: Surroundings, deployment: DeploymentId, blueprint: Blueprint) -> tuple[_Told, _Told]:
    """What a batch of steps takes of late on each device that answers, and its deviation as a share of that."""
    stages = blueprint.plan.stages
    devices = tuple(dict.fromkeys(stage.device for stage in stages))
    answers = await asyncio.gather(
        *(around.ask(device, Pace(deployment), PACE_TIMEOUT_S) for device in devices), return_exceptions=True
    )
    paces, spreads = dict[int, Points](), dict[int, Points]()
    for device, answer in zip(devices, answers, strict=True):
        if isinstance(answer, PeerLLMError):
            log.info("%s does not tell how its stages do: %s", around.name(device), answer)
        elif isinstance(answer, BaseException):
            raise answer
        elif not answer.error:
            places = tuple(str(place) for place, stage in enumerate(stages) if stage.device == device)
            paces |= {int(place): points for place, points in checked(answer.stage_ms, places).items()}
            told = checked(answer.stage_spread, places).items()
            spreads |= {int(place): tuple((n, min(share, MAX_SPREAD)) for n, share in points) for place, points in told}
    return paces, spreads


def _by_place(told: _Told) -> dict[str, dict[str, float]]:
    return {str(place): {str(size): one for size, one in points} for place, points in sorted(told.items())}
