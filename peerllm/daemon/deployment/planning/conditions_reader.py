"""Looks at how a serving deployment's devices and links do, and says what became slower or faster for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from peerllm.daemon.decide.device_profiles import link_profiles
from peerllm.daemon.deployment.establishing import Epoch
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.conditions_watch import EVERY_S, ConditionsWatch
from peerllm.daemon.deployment.planning.live_scenario import stage_paces
from peerllm.planner.cost.observed_times import slower_than_measured
from peerllm.types import DeploymentId, DeviceId


async def read_conditions(
    around: Surroundings,
    deployment: DeploymentId,
    serving: Callable[[], Epoch | None],
    slower: Callable[[DeviceId, float], None],
    changed: Callable[[str], None],
) -> None:
    """Never returns. `serving`: the epoch in which sequences are computed now; `slower` hears how many times."""
    watched: Epoch | None = None
    watch: ConditionsWatch | None = None
    judged = False
    while True:
        await asyncio.sleep(EVERY_S)
        epoch = serving()
        if epoch is None:
            continue
        if watch is None or epoch is not watched:
            watched, watch, judged = epoch, ConditionsWatch(epoch.blueprint.plan), False
        paces, _ = await stage_paces(around, deployment, epoch.blueprint)
        for device, times in watch.devices(paces).items():
            slower(device, times)
            changed(f"{around.name(device)} takes {times:.1f} times as long as before")
        if not judged and (first := watch.beginning()):
            judged, scenario = True, epoch.blueprint.scenario
            stages = epoch.blueprint.plan.stages
            for device, times in slower_than_measured(scenario.model, scenario.devices, stages, first).items():
                slower(device, times)
                changed(f"{around.name(device)} takes {times:.1f} times as long as it was measured to take")
        candidates = around.candidates()
        if candidates.keys() >= set(epoch.devices):
            hidden = epoch.blueprint.scenario.model.layers[0].output_bytes_per_token
            for (a, b), times in watch.links(link_profiles(candidates, around.me), hidden).items():
                way = f"{around.name(a)} to {around.name(b)}"
                changed(f"the way from {way} takes {times:.1f} times as long as before")
