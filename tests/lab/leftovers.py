"""What a device holds, in figures that must come down again when nothing is asked of it any more."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.soak_watch import held
from tests.lab.struck_household import StruckHousehold


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Of one device: its daemon's process, its engine, and what is promised of its memory."""

    slots: int  # in use
    stages: int  # of all epochs
    engine_bytes: int  # weights, keys and values
    promised_bytes: int
    planned_bytes: int  # by the plan that runs
    tasks: int
    files: int
    threads: int
    memory_bytes: int


def leftovers(household: StruckHousehold, host: int) -> Leftovers:
    """As of now."""
    status, load = household.status(host), household.load(host)
    name = household.names[host]
    (own,) = (one for one in status["devices"] if one["name"] == name)
    stages = [stage for one in status["deployments"] for stage in one["plan"]["stages"] if stage["device"] == name]
    process = household.devices[host].process
    assert process is not None
    counts = held(process.pid)
    tasks = household.get(host, "/peerllm/v1/process")[2]["tasks"]
    return Leftovers(
        slots=sum(stage["slots_in_use"] for stage in load["stages"]),
        stages=len(load["stages"]),
        engine_bytes=load["weight_bytes"] + load["kv_bytes"],
        promised_bytes=own["promised_bytes"],
        planned_bytes=sum(stage["memory_bytes"] for stage in stages),
        tasks=tasks,
        files=int(counts["files"]),
        threads=int(counts["threads"]),
        memory_bytes=int(counts["memory"]),
    )
