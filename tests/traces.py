"""What holds of every trace that is written, whoever recorded it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

ROUNDED_US = 0.01  # floats of microseconds
PHASES = {"M", "X", "b", "e", "s", "t", "f"}
TOLD = {"stage", "layers", "sequences", "positions", "tokens", "frame", "bytes", "queued_us"}  # no ids, no text

Event = dict[str, Any]


def named(trace: dict[str, Any], what: str) -> dict[Any, str]:
    """Processes by pid, or threads by (pid, tid)."""
    return {
        (one["pid"], one["tid"]) if what == "thread_name" else one["pid"]: one["args"]["name"]
        for one in trace["traceEvents"]
        if one["name"] == what
    }


def of(trace: dict[str, Any], device: str, track: str = "compute") -> list[Event]:
    """The spans of one track."""
    processes, threads = named(trace, "process_name"), named(trace, "thread_name")
    return [
        one
        for one in trace["traceEvents"]
        if one["ph"] == "X" and processes[one["pid"]] == device and threads[one["pid"], one["tid"]] == track
    ]


def passes(trace: dict[str, Any], device: str) -> list[Event]:
    return [one for one in of(trace, device) if one["name"].startswith("stage ")]


def check(trace: dict[str, Any], devices: Collection[str]) -> None:
    """Every device is there, spans of one track nest or follow each other, arrivals follow sendings."""
    events = trace["traceEvents"]
    processes, threads = named(trace, "process_name"), named(trace, "thread_name")
    assert sorted(processes.values()) == sorted(devices)
    tracks: dict[tuple[int, int], list[Event]] = defaultdict(list)
    stretches: dict[tuple[int, str, str], list[Event]] = defaultdict(list)
    arrows: dict[int, dict[str, list[Event]]] = defaultdict(lambda: defaultdict(list))
    for one in events:
        assert one["ph"] in PHASES and one["pid"] in processes
        if one["ph"] == "X":
            assert one["dur"] >= 0 and set(one["args"]) <= TOLD
            tracks[one["pid"], one["tid"]].append(one)
        elif one["ph"] in "be":
            stretches[one["pid"], one["name"], one["id"]].append(one)
        elif one["ph"] in "stf":
            arrows[one["id"]][one["ph"]].append(one)
    assert set(tracks) <= set(threads)
    for track, spans in tracks.items():
        _nest(spans, threads[track])
    for found in stretches.values():
        begun, ended = found
        assert (begun["ph"], ended["ph"]) == ("b", "e") and begun["ts"] <= ended["ts"] + ROUNDED_US, found
    clocks = trace["otherData"]["devices"]
    for found in arrows.values():
        ((sent,), (came,)) = found["s"], found["t"]
        doubt = sum(clocks[processes[one["pid"]]]["uncertainty_us"] for one in (sent, came))
        assert came["ts"] >= sent["ts"] - doubt - ROUNDED_US, (sent, came, doubt)
        for into in found["f"]:
            assert into["pid"] == came["pid"] and into["ts"] >= came["ts"] - ROUNDED_US


def _nest(spans: list[Event], name: str) -> None:
    open_until: list[float] = []
    for one in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        start, end = one["ts"], one["ts"] + one["dur"]
        while open_until and open_until[-1] <= start + ROUNDED_US:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + ROUNDED_US, f"{name}: {one} overlaps what began before"
        open_until.append(end)
