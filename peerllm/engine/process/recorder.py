"""What this engine did when, for `peerllm trace`: a ring of spans, filled by the compute thread and the loop.

Callers look at `on` first, which is all that recording costs while nobody records. A deployment's coordinator sees that
the compute thread was busy with another model, but not which one, and nothing of other deployments' links.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter_ns
from typing import Literal

from peerllm.engine.messages import Record, Recorded, Span, SpanKind
from peerllm.errors import RefusedError
from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.observer import Destination, LinkObserver, SentFrame
from peerllm.types import DeploymentId, DeviceId

MAX_SPANS = 65_536  # in the ring; the oldest give way
MAX_PART = 1024  # spans in one answer
MAX_PIECES = 256  # of a span; the rest of a larger batch is not named
MAX_ALL_PIECES = 4 * MAX_SPANS  # of all spans in the ring: with both, it takes some 40 MB
MAX_RECORDED = 8  # deployments recorded at once
MAX_SECONDS = 600  # a recording that nobody ends ends by itself

Pieces = tuple[tuple[int, int, int, int], ...]
_KINDS: dict[FrameKind, SpanKind] = {  # of steps; state that is carried is not recorded
    FrameKind.ACTIVATION: "activation",
    FrameKind.TOKEN: "token",
    FrameKind.RELEASE: "release",
    FrameKind.OPEN: "open",
    FrameKind.MASK: "mask",
}


@dataclass(slots=True)
class _Recording:
    before: int  # spans that came into the ring earlier
    running: bool = True
    kept: deque[Span] = field(default_factory=deque)  # once it has ended: what is still to be taken
    lost: int = 0


class Recorder(LinkObserver):
    """`lap` is the compute thread's, the LinkObserver's methods any thread's, the rest the loop's."""

    def __init__(self, limit: int = MAX_SPANS, pieces: int = MAX_ALL_PIECES) -> None:
        self.on = False
        self._limit, self._most_pieces = limit, pieces
        self._lock = threading.Lock()
        self._ring: deque[tuple[DeploymentId, Span]] = deque()  # deployment "": every one's
        self._pieces = 0  # in the ring
        self._fallen = 0  # spans that gave way since it was empty
        self._recordings: dict[DeploymentId, _Recording] = {}
        self._until_ns = 0
        self._lap_ns = 0

    # ---- from the daemon --------------------------------------------------------------------------------------------

    def answer(self, asked: Record) -> Recorded:
        """RefusedError if nothing was recorded, or too much is being recorded."""
        if asked.want == "take":
            spans, left, lost = self.take(asked.deployment)
            return Recorded(asked.request, perf_counter_ns(), spans, left, lost)
        if asked.want == "start":
            self.start(asked.deployment)
        return Recorded(asked.request, perf_counter_ns())

    def start(self, deployment: DeploymentId) -> None:
        """Record from now on; what was recorded of this deployment before is forgotten."""
        with self._lock:
            if deployment not in self._recordings and len(self._recordings) >= MAX_RECORDED:
                raise RefusedError(f"{MAX_RECORDED} deployments are being recorded here already")
            now = perf_counter_ns()
            if not self.on:
                self._lap_ns = now
            self._until_ns = now + MAX_SECONDS * 10**9
            self._recordings[deployment] = _Recording(self._fallen + len(self._ring))
            self.on = True

    def take(self, deployment: DeploymentId) -> tuple[tuple[Span, ...], int, int]:
        """Ends the recording: (the next spans of it, how many are left, how many were lost)."""
        with self._lock:
            recording = self._recordings.get(deployment)
            if recording is None:
                raise RefusedError("nothing is recorded here; the plan may have changed meanwhile")
            if recording.running:
                self._end(deployment, recording)
            part = [recording.kept.popleft() for _ in range(min(MAX_PART, len(recording.kept)))]
            if not recording.kept:
                self._drop(deployment)
            left, lost = len(recording.kept), recording.lost
        return tuple(part), left, lost

    def forget(self, deployment: DeploymentId) -> None:
        """The deployment is gone from here, and with it what was recorded of it."""
        with self._lock:
            self._drop(deployment)

    def _end(self, deployment: DeploymentId, recording: _Recording) -> None:
        recording.running = False
        recording.lost = max(0, self._fallen - recording.before)
        older = max(0, recording.before - self._fallen)  # still in the ring
        recording.kept.extend(_seen_by(deployment, islice(self._ring, older, None)))
        self._rest()

    def _drop(self, deployment: DeploymentId) -> None:
        self._recordings.pop(deployment, None)
        self._rest()

    def _rest(self) -> None:
        if not any(recording.running for recording in self._recordings.values()):
            self.on = False
            self._ring.clear()
            self._pieces = self._fallen = 0

    # ---- from the compute thread ------------------------------------------------------------------------------------

    def lap(
        self,
        name: Literal["idle", "take in", "pass", "hand on"],
        deployment: DeploymentId = "",
        stage: int = -1,
        runs: Sequence[TokenRun] = (),
        prompt: bool = False,
    ) -> None:
        """What the compute thread did since the last lap; `deployment` "": it was not for one alone."""
        now, since = perf_counter_ns(), self._lap_ns
        self._lap_ns = now
        kind: SpanKind = "" if not runs else "prompt" if prompt else "step"
        self._add(deployment, Span(name, since, now, kind, stage, pieces=_pieces(runs)))

    # ---- from the links ---------------------------------------------------------------------------------------------

    def sent(self, to: Destination, number: int, frame: SentFrame, taken_ns: int, written_ns: int) -> None:
        if (kind := _KINDS.get(frame.kind)) is None:
            return
        (deployment, device, stage), pieces = to, _pieces(frame.runs)
        times = frame.handed_ns, frame.encoded_ns
        self._add(deployment, Span("serialise", *times, kind, stage, device, nbytes=frame.nbytes))
        waited = taken_ns - frame.encoded_ns
        where = stage, device, number, frame.nbytes
        self._add(deployment, Span("send", taken_ns, written_ns, kind, *where, waited, pieces))

    def received(self, device: DeviceId, frame: Frame, number: int, nbytes: int, came_ns: int, taken_ns: int) -> None:
        if (kind := _KINDS.get(frame.kind)) is None:
            return
        pieces = _pieces(frame.runs)
        where = frame.stage, device, number, nbytes
        self._add(frame.deployment, Span("receive", came_ns, taken_ns, kind, *where, pieces=pieces))

    def _add(self, deployment: DeploymentId, span: Span) -> None:
        with self._lock:
            if not self.on:  # ended since the caller looked
                return
            if span.end_ns > self._until_ns:
                for one, recording in self._recordings.items():
                    if recording.running:
                        self._end(one, recording)
                return
            self._ring.append((deployment, span))
            self._pieces += len(span.pieces)
            while len(self._ring) > self._limit or self._pieces > self._most_pieces:
                self._pieces -= len(self._ring.popleft()[1].pieces)
                self._fallen += 1


def _pieces(runs: Sequence[TokenRun]) -> Pieces:
    return tuple((run.sequence, run.position, run.length, int(run.sample)) for run in runs[:MAX_PIECES])


def _seen_by(deployment: DeploymentId, spans: Iterable[tuple[DeploymentId, Span]]) -> Iterable[Span]:
    """What the deployment's coordinator may know: of passes of other deployments only that they took place."""
    for owner, span in spans:
        if owner in ("", deployment):
            yield span
        elif span.name in ("pass", "hand on"):
            yield Span("another model", span.start_ns, span.end_ns)
