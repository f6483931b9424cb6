"""What this device computes: a second's worth by its engine, and milliseconds per kind of layer of any model.

Each is measured once per hardware and library version.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import Answer, Profile
from peerllm.daemon.decide.device_profiles import checked
from peerllm.daemon.engine_link.engine_host import EngineHost
from peerllm.daemon.engine_link.machine import hardware
from peerllm.daemon.engine_link.profile_cache import Points, ProfileFile, layer_key
from peerllm.engine.messages import Configured, LayersTimed, Measure, Measured, TimeLayers
from peerllm.errors import BadInputError, EngineError, LinkError, OverloadedError, UnavailableError
from peerllm.saved_files import replace_file
from peerllm.types import LayerKind

MEASURE_TIMEOUT_S = 120.0
LAYERS_TIMEOUT_S = 60.0  # the engine may be at another model's
MAX_CONFIG_CHARACTERS = 1 << 20
MAX_KINDS = 64
MAX_MEASURING = 4  # models whose layers wait to be timed here

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ComputeSpeed:
    """By dtype; `key` names the hardware, versions and threads it was measured with."""

    key: str
    gbytes_per_s: Mapping[str, float]
    gflops: Mapping[str, float]


async def measured(host: EngineHost, configured: Configured, threads: int, file: Path) -> ComputeSpeed:
    """From `file` if it still holds, else measured now. A failure is told in the log and as slowest of all."""
    versions = " ".join(f"{name}={version}" for name, version in sorted(configured.versions.items()))
    place = "" if configured.place == "cpu" else f" on {configured.place}"
    key = f"{await asyncio.to_thread(hardware)}{place} threads={threads} {versions}"
    known = await asyncio.to_thread(_read, file)
    if known is not None and known.key == key:
        return known
    try:
        answer = await host.ask(Measure(host.next_request()), MEASURE_TIMEOUT_S)
    except EngineError as error:
        log.warning("this device could not be measured: %s", error)
        return ComputeSpeed(key, {}, {})
    assert isinstance(answer, Measured)
    found = ComputeSpeed(key, answer.gbytes_per_s, answer.gflops)
    try:
        await asyncio.to_thread(replace_file, file, encode(found, ComputeSpeed))
    except OSError as error:
        log.warning("how fast this machine computes is not kept for the next start: %s", error)
    return found


def _read(file: Path) -> ComputeSpeed | None:
    try:
        found: ComputeSpeed = decode(file.read_bytes(), ComputeSpeed)
    except (OSError, LinkError):
        return None  # not measured yet, or by another version
    return found


class MeasuringEngine(Protocol):
    """What is needed of the engine's host."""

    def next_request(self) -> int: ...

    async def ask(self, message: object, timeout_s: float) -> object: ...


class Profiler:
    """Answers `Profile`: from the file, else by the engine, which then may take what is free of what is lent."""

    def __init__(self, engine: MeasuringEngine, free_bytes: Callable[[], int], computed_by: str, file: Path) -> None:
        self._engine, self._free_bytes, self._computed_by = engine, free_bytes, computed_by
        self._file, self._lock = ProfileFile(file), asyncio.Lock()
        self._measuring: dict[tuple[str, ...], asyncio.Task[dict[LayerKind, Points]]] = {}

    async def answer(self, question: Profile) -> Answer:
        """Without times where they are not known and not asked for, or nothing has room; raises what goes wrong."""
        if len(question.config) > MAX_CONFIG_CHARACTERS or len(question.kinds) > MAX_KINDS:
            raise BadInputError("this model's configuration is too large")
        keys = {
            kind: layer_key(self._computed_by, question.config, kind, question.dtype, question.quantize)
            for kind in question.kinds
        }
        async with self._lock:
            known = checked(await asyncio.to_thread(self._file.get, keys), question.kinds)
        if len(known) == len(keys):
            return Answer(0, layer_ms=known, cached=True)
        if not question.measure:
            return Answer(0)
        found = await self._shared(question, keys)
        return Answer(0, layer_ms={kind: found[kind] for kind in question.kinds if kind in found})

    def computed_by(self, key: str) -> None:
        """The engine has other processors now: what was measured with those before does not hold for it."""
        self._computed_by = key

    async def close(self) -> None:
        """Nothing is measured any more; may be called twice."""
        for task in self._measuring.values():
            task.cancel()
        await asyncio.gather(*self._measuring.values(), return_exceptions=True)

    async def _shared(self, question: Profile, keys: dict[LayerKind, str]) -> dict[LayerKind, Points]:
        """Who asks for the same meanwhile gets the same answer, and what has begun is kept though nobody waits."""
        identity = tuple(keys.values())
        task = self._measuring.get(identity)
        if task is None:
            if len(self._measuring) >= MAX_MEASURING:
                raise OverloadedError(f"{MAX_MEASURING} models' layers wait to be timed here already")
            task = asyncio.create_task(self._measure(question, keys), name="time layers")
            self._measuring[identity] = task
            task.add_done_callback(lambda done: self._over(identity, done))
        await asyncio.wait({task})
        if task.cancelled():
            raise UnavailableError("this device is being stopped")
        return task.result()

    def _over(self, identity: tuple[str, ...], task: asyncio.Task[dict[LayerKind, Points]]) -> None:
        self._measuring.pop(identity, None)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    async def _measure(self, question: Profile, keys: dict[LayerKind, str]) -> dict[LayerKind, Points]:
        found = checked(await self._layers(question), question.kinds)
        async with self._lock:
            await asyncio.to_thread(self._file.put, {keys[kind]: points for kind, points in found.items()})
        return found

    async def _layers(self, question: Profile) -> Mapping[LayerKind, Points]:
        limit = max(0, self._free_bytes())
        request = self._engine.next_request()
        wanted = TimeLayers(request, question.config, question.dtype, limit, question.quantize)
        answer = await self._engine.ask(wanted, LAYERS_TIMEOUT_S)
        if not isinstance(answer, LayersTimed):
            raise EngineError(f"the engine answered {type(answer).__name__} when layers were to be timed")
        for reason in answer.skipped.values():
            log.info("not timed: %s", reason)
        return answer.layer_ms
