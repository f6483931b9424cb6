"""A coordinator's knowledge of how long its candidates take for a model's layers, asked for before it plans.

Devices of one machine disturb each other, so they are measured one after another; devices of different machines at the
same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping

from peerllm.daemon.control_messages import Answer, Hello, Profile
from peerllm.daemon.decide.device_profiles import (
    Candidate,
    LayerTimes,
    MeasuredLayers,
    Source,
    able,
    checked,
    kinds_of,
    machine_contention,
)
from peerllm.daemon.deployment.negotiation import Surroundings, unless_error
from peerllm.engine.messages import Inspected
from peerllm.errors import PeerLLMError
from peerllm.types import DeviceId, LayerKind

RECALL_TIMEOUT_S = 5.0
MEASURE_TIMEOUT_S = 75.0  # the engine may be at another model's first
AGAIN_S = 60.0  # a device that could not be measured is asked again after this
MAX_KNOWN = 1024  # models' times by device

Say = Callable[[str], None]
Key = tuple[DeviceId, str, str]  # device, fingerprint of the model's configuration, dtype and rounding

log = logging.getLogger(__name__)


class ProfileRequests:
    """All deployments of a coordinator share it; only one of them at a time has devices measured."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._known: dict[Key, tuple[str, LayerTimes, Source]] = {}  # with what the device computed by then
        self._failed: dict[Key, float] = {}  # when it is asked again
        self._lock = asyncio.Lock()

    async def of(
        self, inspected: Inspected, candidates: Mapping[DeviceId, Candidate], say: Say
    ) -> dict[DeviceId, MeasuredLayers]:
        """Each candidate's layer times, measured now where they are unknown; "estimated" where they cannot be."""
        fit = [one for one in candidates.values() if able(one, inspected.architecture, inspected.dtype)]
        machines: dict[str, list[Candidate]] = {}
        for one in sorted(fit, key=lambda one: one.device):
            machines.setdefault(one.hello.machine or one.device, []).append(one)
        groups = list(machines.values())
        async with self._lock:
            await asyncio.gather(*(self._machine(inspected, group, say) for group in groups))
        longer = machine_contention(fit)
        return {one.device: self._timing(inspected, one, longer[one.device]) for one in fit}

    def known(self, inspected: Inspected, candidates: Iterable[Candidate]) -> bool:
        """Whether every device that could be asked for its layers' times has told them."""
        fit = [one for one in candidates if able(one, inspected.architecture, inspected.dtype)]
        return not any(self._due(inspected, one) for one in fit)

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _machine(self, inspected: Inspected, group: list[Candidate], say: Say) -> None:
        """Have the devices of one machine measured."""
        await asyncio.gather(*(self._ask(inspected, one, measure=False) for one in group))
        for one in group:
            if self._due(inspected, one):
                say(f"measuring {one.hello.name}")
                await self._ask(inspected, one, measure=True)

    async def _ask(self, inspected: Inspected, one: Candidate, *, measure: bool) -> None:
        """Note what the device answers."""
        if not self._due(inspected, one):
            return
        key, kinds = _key(inspected, one), kinds_of(inspected.profile)
        question = Profile(inspected.config, inspected.dtype, kinds, measure, quantize=inspected.quantize)
        try:
            timeout_s = MEASURE_TIMEOUT_S if measure else RECALL_TIMEOUT_S
            answer = await self._around.ask(one.device, question, timeout_s)
            unless_error(answer, one.hello.name)
        except PeerLLMError as error:
            log.warning("%s was not measured, its speed is estimated for now: %s", one.hello.name, error)
            self._failed[key] = asyncio.get_running_loop().time() + AGAIN_S
            return
        self._note(one, key, kinds, answer, measure)

    def _note(self, one: Candidate, key: Key, kinds: tuple[LayerKind, ...], answer: Answer, measure: bool) -> None:
        times = checked(answer.layer_ms, kinds)
        if missing := [kind for kind in kinds if kind not in times]:
            if not measure:
                return
            log.warning("%s did not time %s: estimated for now", one.hello.name, ", ".join(missing))
            self._failed[key] = asyncio.get_running_loop().time() + AGAIN_S
        if times:
            self._known.pop(key, None)
            self._known[key] = _abilities(one.hello), times, "cached" if answer.cached else "measured"
            while len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]

    def _due(self, inspected: Inspected, one: Candidate) -> bool:
        """Whether the device is to be asked: not all is known of it, and it did not fail just now."""
        key = _key(inspected, one)
        known = self._get(key, one)
        if known is not None and all(kind in known[0] for kind in kinds_of(inspected.profile)):
            return False
        now = asyncio.get_running_loop().time()
        self._failed = {failed: again for failed, again in self._failed.items() if again > now}
        return key not in self._failed

    def _get(self, key: Key, one: Candidate) -> tuple[LayerTimes, Source] | None:
        """The known times; None where there are none, or the device has other libraries or speeds since."""
        abilities, times, source = self._known.get(key, ("", {}, "estimated"))
        return (times, source) if times and abilities == _abilities(one.hello) else None

    def _timing(self, inspected: Inspected, one: Candidate, longer: float) -> MeasuredLayers:
        times, source = self._get(_key(inspected, one), one) or ({}, "estimated")
        return MeasuredLayers(times, longer, source)


def _key(inspected: Inspected, one: Candidate) -> Key:
    return one.device, hashlib.sha256(inspected.config.encode()).hexdigest(), inspected.dtype + inspected.quantize


def _abilities(hello: Hello) -> str:
    """What a device's layer times depend on: times that were measured with another hold no longer."""
    figures = sorted(hello.gbytes_per_s.items()), sorted(hello.gflops.items())
    return repr((hello.place, sorted(hello.libraries.items()), *figures))
