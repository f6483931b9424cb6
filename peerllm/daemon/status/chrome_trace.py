"""Recorded spans of several devices as one trace that chrome://tracing and Perfetto open. Pure.

A device is a process; its compute thread, and each link's sending and receiving end, are its threads. Beside them, as
asynchronous events since they overlap: frames waiting to be sent, hops, and pieces waiting for their pass. Arrows lead
from a frame's sending to its arrival and on to the pass that took it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from peerllm.daemon.decide.clock_alignment import Alignment
from peerllm.engine.messages import Span
from peerllm.types import DeploymentId, DeviceId, Stage

THREADS = 10_000  # a process numbers its threads from its own multiple: some viewers know them by number alone
COMPUTE = 1  # the first of them
MAX_PIECES = 256  # of a span
MAX_NUMBER = 2**32 - 1  # a position or a length
_OF_LINKS = ("send", "receive")
_WAITS = ("idle",)

Event = dict[str, Any]
At = tuple[Span, int, int]  # a span, and its start and end on the coordinator's clock
Frame = tuple[DeviceId, DeviceId, int, int]  # sender, receiver, stage, number on the connection
Due = tuple[DeviceId, int, int, int]  # device, stage, sequence, position


@dataclass(frozen=True, slots=True)
class DeviceTrace:
    """What one device recorded."""

    name: str
    clock: Alignment
    spans: Sequence[Span]
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """What all devices of a plan recorded; times are the coordinator's clock's."""

    model: str
    deployment: DeploymentId
    stages: Sequence[Stage]
    names: Mapping[DeviceId, str]
    traces: Mapping[DeviceId, DeviceTrace]
    began_ns: int
    ended_ns: int
    missing: Mapping[str, str] = field(default_factory=dict)  # device name: why it tells nothing


def encode(recording: Recording) -> bytes:
    """The file, an event a line."""
    head = orjson.dumps(about(recording))[:-1]
    return head + b',"traceEvents":[\n' + b",\n".join(map(orjson.dumps, events(recording))) + b"\n]}\n"


def about(recording: Recording) -> dict[str, Any]:
    """The trace object without its events."""
    clocks = {
        one.name: {
            "offset_us": one.clock.before.offset_ns / 1000,
            "uncertainty_us": one.clock.error_ns / 1000,
            "drift_ppm": round(one.clock.drift * 1e6, 1),
            "spans_lost": one.lost,
        }
        for one in recording.traces.values()
    }
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "model": recording.model,
            "deployment": recording.deployment,
            "seconds": (recording.ended_ns - recording.began_ns) / 1e9,
            "devices": clocks,
            "missing": dict(recording.missing),
        },
    }


def events(recording: Recording) -> Iterator[Event]:
    """Metadata first, then every device's spans in order, then what lies between them. Times are in microseconds."""
    told = {device: _checked(recording, device) for device in recording.traces}
    pids = {device: number for number, device in enumerate(told, 1)}
    tracks = {device: _tracks(recording, pids[device], spans) for device, spans in told.items()}
    for device, pid in pids.items():
        yield from _named(recording, device, pid, tracks[device])
    for device, spans in told.items():
        for span, start, end in spans:
            yield {
                "ph": "X",
                "pid": pids[device],
                "tid": tracks[device][_track(span)][0],
                "cat": "wait" if span.name in _WAITS else "link" if span.name in _OF_LINKS else "compute",
                "name": _title(span),
                "ts": _us(recording, start),
                "dur": (end - start) / 1000,
                "args": _details(recording, span),
            }
    yield from _between(recording, told, tracks, pids)


def _checked(recording: Recording, device: DeviceId) -> list[At]:
    """What another device says, as far as it can be true, in order; of two that start together the longer first."""
    trace, count = recording.traces[device], len(recording.stages)
    first, last = trace.clock.before.there_ns, trace.clock.after.there_ns

    def plausible(span: Span) -> bool:
        return (
            first <= span.start_ns <= span.end_ns <= last
            and (0 if span.name == "pass" else -1) <= span.stage <= count - (span.name == "pass")
            and (span.device in recording.names or (not span.device and span.name not in _OF_LINKS))
            and len(span.pieces) <= MAX_PIECES
            and all(0 <= number <= MAX_NUMBER for piece in span.pieces for number in piece[1:])
            and 0 <= span.queued_ns <= last - first
        )

    found = [
        (span, trace.clock.here(span.start_ns), trace.clock.here(span.end_ns))
        for span in trace.spans
        if plausible(span)
    ]
    return sorted(found, key=lambda at: (at[1], -at[2]))


def _track(span: Span) -> tuple[str, DeviceId, int]:
    if span.name not in _OF_LINKS:
        return "compute", "", -1
    return "send" if span.name == "send" else "receive", span.device, span.stage


def _tracks(recording: Recording, pid: int, spans: Sequence[At]) -> dict[tuple[str, DeviceId, int], tuple[int, str]]:
    """Number and name of each thread. Two links with one device are told apart by the stage they lead to."""
    links = sorted({_track(span) for span, _, _ in spans if span.name in _OF_LINKS})
    pairs = [(way, device) for way, device, _ in links]
    tracks = {("compute", "", -1): (_compute(pid), "compute")}
    for number, (way, device, stage) in enumerate(links, _compute(pid) + 1):
        name = f"{way} {'to' if way == 'send' else 'from'} {recording.names[device]}"
        if pairs.count((way, device)) > 1:
            name += ", for the source" if stage == len(recording.stages) else f", for stage {stage}"
        tracks[way, device, stage] = number, name
    return tracks


def _named(recording: Recording, device: DeviceId, pid: int, tracks: Mapping[Any, tuple[int, str]]) -> Iterator[Event]:
    trace = recording.traces[device]

    def meta(what: str, tid: int, key: str, value: object) -> Event:
        return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": what, "args": {key: value}}

    yield meta("process_name", 0, "name", trace.name)
    yield meta("process_labels", 0, "labels", f"clock ± {trace.clock.error_ns / 1e6:.3g} ms")
    yield meta("process_sort_index", 0, "sort_index", pid)
    for tid, name in tracks.values():
        yield meta("thread_name", tid, "name", name)
        yield meta("thread_sort_index", tid, "sort_index", tid)


def _title(span: Span) -> str:
    if span.name == "pass":
        return f"stage {span.stage}: {span.kind}"
    return f"{span.name} {span.kind}" if span.kind else span.name


def _details(recording: Recording, span: Span) -> Event:
    """No token ids and no text: spans hold none."""
    found: Event = {}
    if span.stage >= 0:
        found["stage"] = span.stage
    if span.name == "pass":
        stage = recording.stages[span.stage]
        found["layers"] = f"{stage.first_layer}-{stage.last_layer}"
    if span.pieces:
        found["sequences"] = [sequence for sequence, _, _, _ in span.pieces]
        found["positions"] = [position for _, position, _, _ in span.pieces]
        found["tokens"] = sum(length for _, _, length, _ in span.pieces)
    if span.frame:
        found["frame"] = span.frame
    if span.nbytes:
        found["bytes"] = span.nbytes
    if span.name == "send":
        found["queued_us"] = span.queued_ns / 1000
    return found


def _between(
    recording: Recording,
    told: Mapping[DeviceId, Sequence[At]],
    tracks: Mapping[DeviceId, Mapping[tuple[str, DeviceId, int], tuple[int, str]]],
    pids: Mapping[DeviceId, int],
) -> Iterator[Event]:
    """Queues, hops, waits for a pass, and the arrows."""
    sendings: dict[Frame, At] = {}
    arrivals: dict[Frame, tuple[DeviceId, At]] = {}
    for device, spans in told.items():
        for at in spans:
            span = at[0]
            if span.name == "send":
                sendings.setdefault((device, span.device, span.stage, span.frame), at)
            elif span.name == "receive":
                arrivals.setdefault((span.device, device, span.stage, span.frame), (device, at))
    due: dict[Due, tuple[int, int]] = {}  # since when a piece waits for its pass; the arrow that leads to it, or 0
    for arrow, (frame, (span, start, _)) in enumerate(sendings.items(), 1):
        pid = pids[frame[0]]
        if span.queued_ns:
            since = _us(recording, start) - span.queued_ns / 1000
            yield from _stretch(pid, "waiting to be sent", f"q{arrow}", since, _us(recording, start))
        if frame not in arrivals:
            continue
        device, (arrival, came, taken) = arrivals[frame]
        # Clocks that are aligned but for their error may show an arrival before its sending.
        yield from _stretch(
            pid,
            f"hop to {recording.names[device]}",
            f"h{arrow}",
            _us(recording, start),
            _us(recording, max(start, came)),
        )
        yield _arrow("s", pid, tracks[frame[0]][_track(span)][0], arrow, _us(recording, start))
        yield _arrow("t", pids[device], tracks[device][_track(arrival)][0], arrow, _us(recording, came))
        for key in _due_after(recording, device, arrival):
            due[key] = taken, arrow
    for frame, (device, (arrival, _, taken)) in arrivals.items():
        if frame not in sendings:
            for key in _due_after(recording, device, arrival):
                due[key] = taken, 0
    for device, spans in told.items():
        for span, start, end in spans:
            if span.name == "pass":
                yield from _waited(recording, device, pids[device], span, start, due)
                for key in _due_after(recording, device, span):
                    due.setdefault(key, (end, 0))


def _due_after(recording: Recording, device: DeviceId, span: Span) -> Iterator[Due]:
    """The pieces that wait on `device` for their next pass once a frame has arrived there, or a pass has ended."""
    count = len(recording.stages)
    after = span.stage + 1 if span.name == "pass" else span.stage
    if span.name == "receive" and span.kind not in ("activation", "token"):
        return
    for sequence, position, length, sample in span.pieces:
        if after < count and recording.stages[after].device == device:
            yield device, after, sequence, position
        elif after == count and sample and recording.stages[0].device == device:
            yield device, 0, sequence, position + length


def _waited(
    recording: Recording, device: DeviceId, pid: int, span: Span, start: int, due: Mapping[Due, tuple[int, int]]
) -> Iterator[Event]:
    """How long each piece of a pass waited for it, and the arrows of the frames that brought them."""
    arrows = set()
    for sequence, position, _, _ in span.pieces:
        since, arrow = due.get((device, span.stage, sequence, position), (start + 1, 0))
        if since <= start:
            identity = f"w{pid}/{span.stage}/{sequence}/{position}"
            name = f"waiting for stage {span.stage}"
            yield from _stretch(pid, name, identity, _us(recording, since), _us(recording, start))
        arrows.add(arrow)
    for arrow in sorted(arrows - {0}):
        yield {**_arrow("f", pid, _compute(pid), arrow, _us(recording, start)), "bp": "e"}


def _stretch(pid: int, name: str, identity: str, since_us: float, until_us: float) -> Iterator[Event]:
    shared = {"pid": pid, "tid": _compute(pid), "cat": "wait", "name": name, "id": identity}
    yield {"ph": "b", "ts": since_us, **shared}
    yield {"ph": "e", "ts": until_us, **shared}


def _arrow(phase: str, pid: int, tid: int, number: int, at_us: float) -> Event:
    return {"ph": phase, "pid": pid, "tid": tid, "cat": "frame", "name": "frame", "id": number, "ts": at_us}


def _compute(pid: int) -> int:
    return pid * THREADS + COMPUTE


def _us(recording: Recording, at_ns: int) -> float:
    return (at_ns - recording.began_ns) / 1000
