"""A coordinator's knowledge of how long its candidates take for a model's layers, asked for before it plans.

Devices of one machine disturb each other, so they are measured one after another. How much they slow each other down
while all of them compute is one factor for all their layers, found with a fixed piece of work: first one after another,
then all at once. Devices of different machines are measured at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping

from peerllm.daemon.control_messages import Answer, Hello, Profile
from peerllm.daemon.decide.device_profiles import (
    WORK,
    Candidate,
    LayerTimes,
    MeasuredLayers,
    Source,
    able,
    checked,
    kinds_of,
)
from peerllm.daemon.deployment.negotiation import Surroundings, unless_error
from peerllm.engine.messages import Inspected
from peerllm.errors import EngineError, PeerLLMError
from peerllm.types import DeviceId, LayerKind

RECALL_TIMEOUT_S = 5.0
MEASURE_TIMEOUT_S = 75.0  # the engine may be at another model's first
AGAIN_S = 60.0  # a device that could not be measured is asked again after this
MAX_KNOWN = 1024  # models' times by device

Say = Callable[[str], None]
Key = tuple[DeviceId, str, str]  # device, fingerprint of the model's configuration, dtype and rounding

log = logging.getLogger(__name__)


class ProfileRequests:
    """One coordinator's; its deployments share it, and only one of them at a time has devices measured."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._known: dict[Key, tuple[str, LayerTimes, Source]] = {}  # with what the device computed by then
        self._failed: dict[Key, float] = {}  # when it is asked again
        self._lock = asyncio.Lock()

    async def of(
        self, inspected: Inspected, candidates: Mapping[DeviceId, Candidate], say: Say, busy: bool = False
    ) -> dict[DeviceId, MeasuredLayers]:
        """What each candidate measured, now where that is unknown; "estimated" where it cannot be. Raises nothing.

        `busy`: all devices will compute at the same time, so devices of one machine are to know what that costs them.
        """
        fit = [one for one in candidates.values() if able(one, inspected.architecture, inspected.dtype)]
        machines: dict[str, list[Candidate]] = {}
        for one in sorted(fit, key=lambda one: one.device):
            machines.setdefault(one.hello.machine or one.device, []).append(one)
        groups = list(machines.values())
        async with self._lock:
            factors = await asyncio.gather(*(self._machine(inspected, group, say, busy) for group in groups))
        return {
            one.device: self._timing(inspected, one, factor)
            for group, factor in zip(groups, factors, strict=True)
            for one in group
        }

    def known(self, inspected: Inspected, candidates: Iterable[Candidate]) -> bool:
        """Whether every device that could be asked for its layers' times has told them."""
        fit = [one for one in candidates if able(one, inspected.architecture, inspected.dtype)]
        return not any(self._due(inspected, one) for one in fit)

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _machine(self, inspected: Inspected, group: list[Candidate], say: Say, busy: bool) -> float:
        """Have the devices of one machine measured; how many times longer they take while all of them compute."""
        await asyncio.gather(*(self._ask(inspected, one, measure=False) for one in group))
        for one in group:
            if self._due(inspected, one):
                say(f"measuring {one.hello.name}")
                await self._ask(inspected, one, measure=True)
        if not busy or len(group) < 2:
            return 1.0
        say(f"measuring {', '.join(one.hello.name for one in group)} while all of them work")
        try:
            return await self._contention(group)
        except PeerLLMError as error:
            log.warning("how devices of one machine slow each other down was not measured: %s", error)
            return 1.0

    async def _contention(self, group: list[Candidate]) -> float:
        """At least 1; and at most as if one device worked after the other."""
        everyone = repr([(one.device, _abilities(one.hello)) for one in group])
        company = hashlib.sha256(everyone.encode()).hexdigest()[:32]
        alone = [await self._work_ms(one, "") for one in group]
        together = await asyncio.gather(*(self._work_ms(one, company) for one in group))
        return min(float(len(group)), max(1.0, sum(together) / sum(alone)))

    async def _work_ms(self, one: Candidate, company: str) -> float:
        answer = await self._around.ask(one.device, Profile("", "float32", (WORK,), True, company), MEASURE_TIMEOUT_S)
        unless_error(answer, one.hello.name)
        for _, ms in checked(answer.layer_ms, (WORK,)).get(WORK, ()):
            return ms
        raise EngineError(f"{one.hello.name} does not say how long work takes there")

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
        """None also where the device computes by something else now."""
        abilities, times, source = self._known.get(key, ("", {}, "estimated"))
        return (times, source) if times and abilities == _abilities(one.hello) else None

    def _timing(self, inspected: Inspected, one: Candidate, contention: float) -> MeasuredLayers:
        times, source = self._get(_key(inspected, one), one) or ({}, "estimated")
        return MeasuredLayers(times, contention, source)


def _key(inspected: Inspected, one: Candidate) -> Key:
    return one.device, hashlib.sha256(inspected.config.encode()).hexdigest(), inspected.dtype + inspected.quantize


def _abilities(hello: Hello) -> str:
    """Differs where a device's old times do not hold any more."""
    figures = sorted(hello.gbytes_per_s.items()), sorted(hello.gflops.items())
    return repr((hello.place, sorted(hello.libraries.items()), *figures))
