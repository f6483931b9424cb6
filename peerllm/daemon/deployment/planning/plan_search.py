"""The search for a deployment's next plan: who could take part, with how much memory, and what failed there of late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from peerllm.daemon.decide.demand import Blueprint, Moving, draw_up, redraw
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.device_failures import DeviceFailures
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Inspected
from peerllm.errors import InfeasibleError, PeerLLMError, UnavailableError
from peerllm.planner.replan.replan_decision import ReplanDecision
from peerllm.types import DeviceId, Workload

LATECOMERS = 3  # times that devices are measured because some came while others were
SLOWER_S = 600.0  # a device found slower than it was measured counts as that for so long


@dataclass(frozen=True, slots=True)
class PlanSearched:
    """A plan and the devices that it was made from. `decision`: stay or move, where there was a plan before."""

    candidates: dict[DeviceId, Candidate]
    blueprint: Blueprint
    decision: ReplanDecision | None = None


class PlanSearch:
    """Searches the plans of one deployment; `say` tells people what is being done."""

    def __init__(
        self, options: RunOptions, around: Surroundings, timings: ProfileRequests, say: Callable[[str], None]
    ) -> None:
        self.free: dict[DeviceId, int] = {}  # what devices said last, fresher than what they announce
        self._options, self._around, self._timings, self._say = options, around, timings, say
        self._failures = DeviceFailures(around.me)
        self._slower: dict[DeviceId, tuple[float, float]] = {}  # how many times longer than measured, and until when
        self._had: tuple[int, int] = (0, 0)  # the most slots and context that it has served with

    async def plan(
        self,
        inspected: Inspected,
        absent: frozenset[DeviceId],
        moving: Moving | None = None,
        held: Mapping[DeviceId, int] | None = None,
    ) -> PlanSearched:
        """The plan for the devices that could take part, measured first; InfeasibleError says what is missing.

        `held`: what is promised to this deployment already, by device, and so free for it.
        """
        candidates = await self._timed(inspected, absent, held or {})
        if moving is None or not moving.compare:  # else nobody waits for it
            self._say(f"planning for {len(candidates)} device{'s' * (len(candidates) > 1)}")
        return await self._best(inspected, candidates, moving)

    def failed(self, device: DeviceId, epoch: int, promised_bytes: int, error: PeerLLMError) -> None:
        """The device failed in the plan of that epoch: the next one makes less use of it."""
        self._failures.note(device, epoch, promised_bytes, error, asyncio.get_running_loop().time())

    def slower(self, device: DeviceId, times: float) -> None:
        """The device's layers take so many times what they took when the running plan began."""
        now = asyncio.get_running_loop().time()
        before, until = self._slower.get(device, (1.0, 0.0))
        self._slower[device] = (before if until > now else 1.0) * times, now + SLOWER_S

    async def explained(
        self, inspected: Inspected, error: InfeasibleError, absent: frozenset[DeviceId], held: Mapping[DeviceId, int]
    ) -> PeerLLMError:
        """The error to show: a device's failure if only that keeps a plan from being feasible, else what is missing."""
        failed = self._failures.repeated(asyncio.get_running_loop().time())
        if failed is not None:
            with contextlib.suppress(InfeasibleError):
                everyone = self._candidates(absent, held)
                await asyncio.to_thread(draw_up, self._options, inspected, everyone, self._around.me)
                return failed
        return self._with_absent(error)

    def served(self, work: Workload) -> str:
        """Note that a plan for this workload serves. For people: what it gives less of than an earlier one, or ""."""
        (slots, context), self._had = self._had, (max(self._had[0], work.sequences), max(self._had[1], work.context))
        less = [f"a context of {work.context} tokens instead of {context}"] if work.context < context else []
        less += [f"{work.sequences} answers at once instead of {slots}"] if work.sequences < slots else []
        return f"{' and '.join(less)}: the devices here have too little memory for more" if less else ""

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _best(
        self, inspected: Inspected, candidates: dict[DeviceId, Candidate], moving: Moving | None
    ) -> PlanSearched:
        """The best plan, with the context that it had and without devices that failed where that is feasible."""
        failure: InfeasibleError | None = None
        usable = self._failures.usable(candidates, asyncio.get_running_loop().time())
        if moving is not None and moving.compare:  # a plan that serves is not left for a device's first failure
            usable = usable[-1:]
        for least_context in dict.fromkeys((self._had[1], 0)):
            for chosen in usable:
                try:
                    if moving is None:
                        drawn = await asyncio.to_thread(
                            draw_up, self._options, inspected, chosen, self._around.me, least_context
                        )
                        return PlanSearched(candidates, drawn)
                    moved = await asyncio.to_thread(
                        redraw, self._options, inspected, chosen, self._around.me, least_context, moving
                    )
                    return PlanSearched(candidates, *moved)
                except InfeasibleError as error:
                    failure = error
        assert failure is not None
        raise failure

    async def _timed(
        self, inspected: Inspected, absent: frozenset[DeviceId], held: Mapping[DeviceId, int]
    ) -> dict[DeviceId, Candidate]:
        """The devices that could take part, measured; InfeasibleError before any is measured in vain."""
        around = self._around
        candidates = self._candidates(absent, held)
        if not self._timings.known(inspected, candidates.values()):
            await asyncio.to_thread(draw_up, self._options, inspected, candidates, around.me)
        for _ in range(LATECOMERS):
            timings = await self._timings.of(inspected, candidates, self._say)
            here = self._candidates(absent, held)  # measuring takes a while
            if here.keys() <= candidates.keys():
                break
            candidates = here
        return {
            device: self._as_slow(replace(one, timing=timings[device]) if device in timings else one)
            for device, one in here.items()
            if device in candidates  # a guess beside measurements would make it look the fastest
        }

    def _candidates(self, absent: frozenset[DeviceId], held: Mapping[DeviceId, int]) -> dict[DeviceId, Candidate]:
        """The devices that could take part, with their free memory; UnavailableError if this one is not among them."""
        around = self._around
        candidates = {
            device: replace(one, free_bytes=self._free(one) + held.get(device, 0))
            for device, one in around.candidates().items()
            if device not in absent or device == around.me
        }
        if around.me not in candidates:
            raise UnavailableError("this device takes no part now: it is paused, or its engine does not run")
        return candidates

    def _free(self, one: Candidate) -> int:
        return self.free.get(one.device, one.free_bytes)

    def _as_slow(self, one: Candidate) -> Candidate:
        """The device with the times that were observed of late in place of those it measured."""
        times, until = self._slower.get(one.device, (1.0, 0.0))
        if until <= asyncio.get_running_loop().time():
            return one
        hello = replace(
            one.hello,
            gbytes_per_s={kind: speed / times for kind, speed in one.hello.gbytes_per_s.items()},
            gflops={kind: speed / times for kind, speed in one.hello.gflops.items()},
        )
        alone = {k: tuple((n, ms * times) for n, ms in points) for k, points in one.timing.alone.items()}
        return replace(one, hello=hello, timing=replace(one.timing, alone=alone))

    def _with_absent(self, error: InfeasibleError) -> InfeasibleError:
        away = ", ".join(self._around.absent())
        return InfeasibleError(f"{error}; away: {away}", error.missing_bytes) if away else error
