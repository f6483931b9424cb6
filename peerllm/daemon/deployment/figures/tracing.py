"""Recording what the devices of a running deployment do when: started and collected by its coordinator."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from peerllm.daemon.control_messages import Trace
from peerllm.daemon.decide.clock_alignment import Alignment, Reading, quickest
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.deployment.negotiation import Surroundings, unless_error
from peerllm.daemon.status import chrome_trace
from peerllm.engine.messages import Recorded, Span
from peerllm.errors import EngineError, LinkError, PeerLLMError, RefusedError
from peerllm.planner.scenario.scenario_export import names_in
from peerllm.types import DeploymentId, DeviceId

CLOCK_TRIES = 16  # readings of each clock, before and after; the quickest counts
ANSWER_TIMEOUT_S = 10.0
MAX_RECORDINGS = 16  # that this device has begun and not collected; the oldest is given up
MAX_SPANS = 65_536  # of one device, whatever it has to tell
MAX_PIECES = 4 * MAX_SPANS  # ... and of all of them together
COLLECT_TIMEOUT_S = 60.0  # for all parts of one device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Begun:
    deployment: DeploymentId
    blueprint: Blueprint
    clocks: dict[DeviceId, Reading]
    began_ns: int


class Traces:
    """Keeps the latest recording of each deployment; ending an earlier one raises RefusedError."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._numbers = itertools.count(1)
        self._begun: dict[int, _Begun] = {}

    async def begin(self, deployment: DeploymentId, blueprint: Blueprint) -> int:
        """Make every device of the plan record; raises why one does not. Returns the recording's number."""
        devices = blueprint.plan.devices
        clocks = _all(await self._each(devices, lambda device: self._clock(device, deployment)))
        began = time.perf_counter_ns()
        _all(await self._each(devices, lambda device: self._ask(device, deployment, "start")))
        for number in [number for number, one in self._begun.items() if one.deployment == deployment]:
            del self._begun[number]
        if len(self._begun) >= MAX_RECORDINGS:
            del self._begun[next(iter(self._begun))]
        number = next(self._numbers)
        self._begun[number] = _Begun(deployment, blueprint, clocks, began)
        return number

    async def end(self, number: int, deployment: DeploymentId, model: str) -> bytes:
        """End a recording on every device; returns the file, which names the devices that did not tell."""
        begun = self._begun.get(number)
        if begun is None or begun.deployment != deployment:
            raise RefusedError("this recording is over: another one of the same model has taken its place")
        del self._begun[number]
        devices = tuple(begun.clocks)
        firsts = await self._each(devices, lambda device: self._ask(device, deployment, "take"))
        ended = time.perf_counter_ns()
        clocks = await self._each(devices, lambda device: self._clock(device, deployment))
        names = names_in(begun.blueprint.scenario.devices)
        traces: dict[DeviceId, chrome_trace.DeviceTrace] = {}
        missing: dict[str, str] = {}
        for device in devices:  # one after the other: what they tell may be long
            first, after = firsts[device], clocks[device]
            try:
                spans = await self._rest(device, deployment, _unless(first))
                clock = Alignment(begun.clocks[device], _unless(after))
            except PeerLLMError as error:
                missing[names[device]] = str(error)
            else:
                traces[device] = chrome_trace.DeviceTrace(names[device], clock, spans, _unless(first).lost)
        if not traces:
            _all(firsts)
            _all(clocks)
        stages = begun.blueprint.plan.stages
        known = {device: names[device] for device in devices}
        began = begun.began_ns - max(trace.clock.error_ns for trace in traces.values())  # so that no span is before it
        recording = chrome_trace.Recording(model, deployment, stages, known, traces, began, ended, missing)
        return await asyncio.to_thread(chrome_trace.encode, recording)

    async def _rest(self, device: DeviceId, deployment: DeploymentId, part: Recorded) -> list[Span]:
        spans = list(part.spans)
        try:
            async with asyncio.timeout(COLLECT_TIMEOUT_S):
                while part.left and part.spans and len(spans) < MAX_SPANS and _pieces(spans) < MAX_PIECES:
                    part = await self._ask(device, deployment, "take")
                    spans += part.spans
        except TimeoutError as error:
            name = self._around.name(device)
            raise LinkError(f"{name} did not tell all of it within {COLLECT_TIMEOUT_S:g} s") from error
        return spans

    async def _clock(self, device: DeviceId, deployment: DeploymentId) -> Reading:
        readings = []
        for _ in range(CLOCK_TRIES):
            sent = time.perf_counter_ns()
            there = (await self._ask(device, deployment, "clock")).clock_ns
            readings.append(Reading(sent, there, time.perf_counter_ns()))
        return quickest(readings)

    async def _ask(
        self, device: DeviceId, deployment: DeploymentId, want: Literal["clock", "start", "take"]
    ) -> Recorded:
        answer = await self._around.ask(device, Trace(deployment, want), ANSWER_TIMEOUT_S)
        unless_error(answer, self._around.name(device))
        if answer.recorded is None:
            raise EngineError(f"{self._around.name(device)} does not say what it recorded")
        return answer.recorded

    async def _each(
        self, devices: Iterable[DeviceId], work: Callable[[DeviceId], Awaitable[T]]
    ) -> dict[DeviceId, T | PeerLLMError]:
        async def one(device: DeviceId) -> tuple[DeviceId, T | PeerLLMError]:
            try:
                return device, await work(device)
            except PeerLLMError as error:
                return device, error

        return dict(await asyncio.gather(*(one(device) for device in devices)))


def _pieces(spans: Iterable[Span]) -> int:
    return sum(len(span.pieces) for span in spans)


def _unless(found: T | PeerLLMError) -> T:
    if isinstance(found, PeerLLMError):
        raise found
    return found


def _all(found: dict[DeviceId, T | PeerLLMError]) -> dict[DeviceId, T]:
    """Wait for all; raises the first error."""
    return {device: _unless(one) for device, one in found.items()}
