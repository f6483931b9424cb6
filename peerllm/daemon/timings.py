"""A coordinator's knowledge of how long its candidates take for a model's layers, asked for before it plans.

Devices of one machine disturb each other, so they are measured one after another, and then once more all together: the
times of a device while the others work. Devices of different machines are measured at the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping

from peerllm.daemon.messages import Answer, Hello, Profile
from peerllm.daemon.negotiation import Surroundings, unless_error
from peerllm.daemon.profiles import Candidate, LayerTimes, Source, Timing, able, checked, kinds_of
from peerllm.engine.messages import Inspected
from peerllm.errors import PeerLLMError
from peerllm.types import DeviceId, LayerKind

RECALL_TIMEOUT_S = 5.0
MEASURE_TIMEOUT_S = 75.0  # beside the window; the engine may be at another model's first
TOGETHER_S = 2.0  # how long devices of one machine work at the same time, at least ...
TOGETHER_MOST_S = 10.0  # ... and at most
ROUNDS = 6  # passes over all kinds and counts that should have room in it, at the pace of a device alone
AGAIN_S = 60.0  # a device that could not be measured is asked again after this
MAX_KNOWN = 1024  # models' times by device

Say = Callable[[str], None]
Key = tuple[DeviceId, str, str, str]  # device, fingerprint of the model's configuration, dtype and rounding, company

log = logging.getLogger(__name__)


class Timings:
    """One coordinator's; its deployments share it, and only one of them at a time has devices measured."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._known: dict[Key, tuple[str, LayerTimes, Source]] = {}  # with what the device computed by then
        self._failed: dict[Key, float] = {}  # when it is asked again
        self._lock = asyncio.Lock()

    async def of(
        self, inspected: Inspected, candidates: Mapping[DeviceId, Candidate], say: Say
    ) -> dict[DeviceId, Timing]:
        """What each candidate measured, now where that is unknown; "estimated" where it cannot be. Raises nothing."""
        fit = [one for one in candidates.values() if able(one, inspected.architecture, inspected.dtype)]
        machines: dict[str, list[Candidate]] = {}
        for one in sorted(fit, key=lambda one: one.device):
            machines.setdefault(one.hello.machine or one.device, []).append(one)
        async with self._lock:
            await asyncio.gather(*(self._machine(inspected, group, say) for group in machines.values()))
        return {one.device: self._timing(inspected, one, group) for group in machines.values() for one in group}

    def known(self, inspected: Inspected, candidates: Iterable[Candidate]) -> bool:
        """Whether `of` would ask nobody."""
        fit = [one for one in candidates if able(one, inspected.architecture, inspected.dtype)]
        return not any(self._due(inspected, one, "") for one in fit)

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _machine(self, inspected: Inspected, group: list[Candidate], say: Say) -> None:
        await asyncio.gather(*(self._ask(inspected, one, measure=False) for one in group))
        for one in group:
            if self._due(inspected, one, ""):
                say(f"measuring {one.hello.name}")
                await self._ask(inspected, one, measure=True)
        company = _company(group)
        if not company or any(self._get(_key(inspected, one, ""), one) is None for one in group):
            return  # where one could not be measured alone it will not be beside others
        await asyncio.gather(*(self._ask(inspected, one, measure=False, company=company) for one in group))
        if any(self._due(inspected, one, company) for one in group):
            say(f"measuring {', '.join(one.hello.name for one in group)} while all of them work")
            window = self._window(inspected, group)
            await asyncio.gather(
                *(self._ask(inspected, one, measure=True, company=company, window_s=window) for one in group)
            )

    async def _ask(
        self,
        inspected: Inspected,
        one: Candidate,
        *,
        measure: bool,
        company: str = "",
        window_s: float = TOGETHER_S,
    ) -> None:
        """Note what the device answers. In company all are asked to measure, also who knows."""
        if not self._due(inspected, one, company) and not (measure and company):
            return
        key, kinds = _key(inspected, one, company), kinds_of(inspected.profile)
        window_s = window_s if company else 0.0
        question = Profile(inspected.config, inspected.dtype, kinds, measure, company, window_s, inspected.quantize)
        try:
            timeout_s = MEASURE_TIMEOUT_S + window_s if measure else RECALL_TIMEOUT_S
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

    def _due(self, inspected: Inspected, one: Candidate, company: str) -> bool:
        """Whether the device is to be asked: not all is known of it, and it did not fail just now."""
        key = _key(inspected, one, company)
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

    def _timing(self, inspected: Inspected, one: Candidate, group: list[Candidate]) -> Timing:
        alone = self._get(_key(inspected, one, ""), one)
        company = _company(group)
        together = self._get(_key(inspected, one, company), one) if company else None
        source = alone[1] if alone else together[1] if together else "estimated"
        return Timing(alone[0] if alone else {}, together[0] if together else None, source)

    def _window(self, inspected: Inspected, group: list[Candidate]) -> float:
        """Long enough for the slowest of them."""
        rounds = [
            sum(ms for points in known[0].values() for _, ms in points) / 1e3
            for one in group
            if (known := self._get(_key(inspected, one, ""), one))
        ]
        return min(TOGETHER_MOST_S, max(TOGETHER_S, ROUNDS * len(group) * max(rounds, default=0.0)))


def _key(inspected: Inspected, one: Candidate, company: str) -> Key:
    how = inspected.dtype + inspected.quantize
    return one.device, hashlib.sha256(inspected.config.encode()).hexdigest(), how, company


def _abilities(hello: Hello) -> str:
    """Differs where a device's old times do not hold any more."""
    figures = sorted(hello.gbytes_per_s.items()), sorted(hello.gflops.items())
    return repr((hello.place, sorted(hello.libraries.items()), *figures))


def _company(group: list[Candidate]) -> str:
    """Stands for the devices of one machine as they are now; "" for a single one."""
    if len(group) < 2:
        return ""
    return hashlib.sha256(repr([(one.device, _abilities(one.hello)) for one in group]).encode()).hexdigest()[:32]
