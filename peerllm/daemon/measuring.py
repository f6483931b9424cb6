"""What this device computes a second, measured by its engine once per hardware and library version."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peerllm.codec import decode, encode
from peerllm.daemon.engine_host import EngineHost
from peerllm.daemon.machine import hardware
from peerllm.engine.messages import Configured, Measure, Measured
from peerllm.errors import EngineError, LinkError

MEASURE_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compute:
    """By dtype; `key` names the hardware, versions and threads it was measured with."""

    key: str
    gbytes_per_s: Mapping[str, float]
    gflops: Mapping[str, float]


async def measured(host: EngineHost, configured: Configured, threads: int, file: Path) -> Compute:
    """From `file` if it still holds, else measured now. A failure is told in the log and as slowest of all."""
    versions = " ".join(f"{name}={version}" for name, version in sorted(configured.versions.items()))
    key = f"{await asyncio.to_thread(hardware)} threads={threads} {versions}"
    known = await asyncio.to_thread(_read, file)
    if known is not None and known.key == key:
        return known
    try:
        answer = await host.ask(Measure(host.next_request()), MEASURE_TIMEOUT_S)
    except EngineError as error:
        log.warning("this device could not be measured: %s", error)
        return Compute(key, {}, {})
    assert isinstance(answer, Measured)
    found = Compute(key, answer.gbytes_per_s, answer.gflops)
    await asyncio.to_thread(file.write_bytes, encode(found, Compute))
    return found


def _read(file: Path) -> Compute | None:
    try:
        found: Compute = decode(file.read_bytes(), Compute)
    except (OSError, LinkError):
        return None  # not measured yet, or by another version
    return found
