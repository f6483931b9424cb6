"""The search for a deployment's next plan: who could take part, with how much memory, and what failed there of late."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from peerllm.daemon.decide.demand import Blueprint, draw_up
from peerllm.daemon.decide.device_failures import DeviceFailures
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.profile_requests import ProfileRequests
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Inspected
from peerllm.errors import InfeasibleError, PeerLLMError, UnavailableError
from peerllm.types import DeviceId, Workload

LATECOMERS = 3  # times that devices are measured because some came while others were


class PlanSearch:
    """One deployment's, kept from plan to plan; `say` tells people what is being done."""

    def __init__(
        self, options: RunOptions, around: Surroundings, timings: ProfileRequests, say: Callable[[str], None]
    ) -> None:
        self.free: dict[DeviceId, int] = {}  # what devices said last, fresher than what they announce
        self._options, self._around, self._timings, self._say = options, around, timings, say
        self._failures = DeviceFailures(around.me)
        self._had: tuple[int, int] = (0, 0)  # the most slots and context that it has served with

    async def plan(self, inspected: Inspected, absent: set[DeviceId]) -> tuple[dict[DeviceId, Candidate], Blueprint]:
        """The devices that could take part, measured, and the plan for them; InfeasibleError says what is missing."""
        candidates = await self._timed(inspected, absent)
        self._say(f"planning for {len(candidates)} device{'s' * (len(candidates) > 1)}")
        return candidates, await self._best(inspected, candidates)

    def failed(self, device: DeviceId, epoch: int, promised_bytes: int, error: PeerLLMError) -> None:
        """The device failed in the plan of that epoch: the next one makes less use of it."""
        self._failures.note(device, epoch, promised_bytes, error, asyncio.get_running_loop().time())

    async def explained(self, inspected: Inspected, error: InfeasibleError, absent: set[DeviceId]) -> PeerLLMError:
        """The error to show: a device's failure if only that keeps a plan from being feasible, else what is missing."""
        failed = self._failures.repeated(asyncio.get_running_loop().time())
        if failed is not None:
            with contextlib.suppress(InfeasibleError):
                everyone = self._candidates(absent)
                await asyncio.to_thread(draw_up, self._options, inspected, everyone, self._around.me)
                return failed
        return self._with_absent(error)

    def served(self, work: Workload) -> str:
        """A plan for this workload serves. What it gives less of than an earlier one did, for people; "" if nothing."""
        (slots, context), self._had = self._had, (max(self._had[0], work.sequences), max(self._had[1], work.context))
        less = [f"a context of {work.context} tokens instead of {context}"] if work.context < context else []
        less += [f"{work.sequences} answers at once instead of {slots}"] if work.sequences < slots else []
        return f"{' and '.join(less)}: the devices here have too little memory for more" if less else ""

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _best(self, inspected: Inspected, candidates: Mapping[DeviceId, Candidate]) -> Blueprint:
        """With the context it had, if that is feasible at all; of such plans one that avoids what failed of late."""
        failure: InfeasibleError | None = None
        usable = self._failures.usable(candidates, asyncio.get_running_loop().time())
        for least_context in dict.fromkeys((self._had[1], 0)):
            for chosen in usable:
                try:
                    return await asyncio.to_thread(
                        draw_up, self._options, inspected, chosen, self._around.me, least_context
                    )
                except InfeasibleError as error:
                    failure = error
        assert failure is not None
        raise failure

    async def _timed(self, inspected: Inspected, absent: set[DeviceId]) -> dict[DeviceId, Candidate]:
        """The devices that could take part, measured; InfeasibleError before any is measured in vain."""
        around = self._around
        candidates = self._candidates(absent)
        if not self._timings.known(inspected, candidates.values()):
            await asyncio.to_thread(draw_up, self._options, inspected, candidates, around.me)
        for _ in range(LATECOMERS):
            timings = await self._timings.of(inspected, candidates, self._say)
            here = self._candidates(absent)  # measuring takes a while
            if here.keys() <= candidates.keys():
                break
            candidates = here
        return {
            device: replace(one, timing=timings[device]) if device in timings else one
            for device, one in here.items()
            if device in candidates  # a guess beside measurements would make it look the fastest
        }

    def _candidates(self, absent: set[DeviceId]) -> dict[DeviceId, Candidate]:
        """With what is free of their memory; UnavailableError if this device is not among them."""
        around = self._around
        candidates = {
            device: replace(one, free_bytes=self.free.get(device, one.free_bytes))
            for device, one in around.candidates().items()
            if device not in absent or device == around.me
        }
        if around.me not in candidates:
            raise UnavailableError("this device takes no part now: it is paused, or its engine does not run")
        return candidates

    def _with_absent(self, error: InfeasibleError) -> InfeasibleError:
        away = ", ".join(self._around.absent())
        return InfeasibleError(f"{error}; away: {away}", error.missing_bytes) if away else error
