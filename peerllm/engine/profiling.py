"""Milliseconds per kind of layer at several token counts, by the very passes that a stage makes (base.Shard.forward).

Timing depends on shapes alone, so one layer at a time is made up from the configuration, and a device too small for the
model is timed like any other. A stage costs a pass (masks, positions, the model's own walk) and its layers: the pass is
told apart, as the kind "pass", and layers are net of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch

from peerllm.engine.base import Draw, Sampler, Segment, Shard
from peerllm.engine.memory import return_memory
from peerllm.engine.messages import PASS, LayersTimed, TimeLayers
from peerllm.engine.mockup import CHUNK, SEQUENCES, Mockup, Outline
from peerllm.engine.place import PROCESSORS, Place
from peerllm.errors import EngineError, RefusedError
from peerllm.types import LayerKind, Sampling

CHUNKS = (32, 64, 128)  # tokens of one prompt; up to SEQUENCES[0] tokens are one each of as many sequences
FILL = 192  # tokens that a sequence holds while its next one is timed
FILL_S = 1.0  # to fill all sequences with, token by token; fewer tokens where that would take longer
LEAST_FILL = 16  # tokens; fewer than these are not worth a pass for each sequence
BUDGET_S = 0.04  # per kind and count
MIN_RUNS = 3
LONG_S = 0.16  # ... but no more of slow ones than this takes
LIMIT_S = 10.0  # for all kinds, building them included: large models; counts left out follow from the others
BLOCK_SHARE = 3  # of the time, to 1 for the embedding and for the head
GRACE_S = 0.5
PAUSE, PAUSE_S = 2, 0.008  # passes, at most so long: a stage waits for the others, and wakes up with cold caches
MOST_IN_TURN, TURN_S = 4, 0.03  # runs of one count in a row while others work too, if they take no longer
LEAST_MS = 1e-4  # what is left of a layer where timing cannot tell it from the pass

Check = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One pass: how long it took, and how long this thread was computing meanwhile."""

    wall_s: float
    busy_s: float


def time_layers(message: TimeLayers, sampler: Sampler, check: Check, place: Place = PROCESSORS) -> LayersTimed:
    """One kind after the other. In a window every moment of it is used, so that the other engines are never alone."""
    together, started, threads = message.window_s > 0, time.perf_counter(), torch.get_num_threads()
    outline, skipped = Outline(message, place.device), {}
    end = started + message.window_s if together else time.perf_counter() + LIMIT_S
    runs: dict[LayerKind, dict[int, list[Run]]] = {}
    layers: dict[LayerKind, int] = {}
    for number, kind in enumerate(outline.kinds):
        now = time.perf_counter()
        share, *others = (1 if one in ("embedding", "head") else BLOCK_SHARE for one in outline.kinds[number:])
        until = now + max(0.0, end - now) * share / (share + sum(others))
        try:
            mockup = outline.plan(kind)
        except RefusedError as error:
            skipped[kind] = str(error)
            continue
        try:
            work = Work(outline, mockup, sampler, check, place)
            try:
                samples = work.rounds(until) if together else work.enough(until)
            finally:
                work.close()
        except torch.OutOfMemoryError as error:  # an accelerator keeps more than the tensors take
            skipped[kind] = str(error)
            continue
        runs[kind] = {count: some[1:] or some for count, some in samples.items() if some}
        layers[kind] = mockup.layers
    return LayersTimed(message.request, net(typical(runs, together, threads), layers), skipped)


def typical(
    runs: Mapping[LayerKind, Mapping[int, Sequence[Run]]], together: bool, threads: int
) -> dict[LayerKind, dict[int, float]]:
    """Milliseconds of a pass from its runs: alone, with what strangers on the processor add to them left out.

    Together, the processor time it took, stretched by what all runs waited for a processor: a pass shorter than a turn
    of the system's scheduler goes undisturbed or waits a whole turn, which a few runs of one kind cannot tell.
    """
    if not together:
        # With several threads this one's own time says little: it sleeps while it waits for the others.
        return {
            kind: {
                count: (median(run.busy_s for run in some) if threads == 1 else min(run.wall_s for run in some)) * 1e3
                for count, some in counts.items()
            }
            for kind, counts in runs.items()
        }
    every = [run for counts in runs.values() for some in counts.values() for run in some]
    busy_s = sum(run.busy_s for run in every)
    stretch = sum(run.wall_s for run in every) / busy_s if busy_s else 1.0
    return {
        kind: {count: fmean(run.busy_s for run in some) * stretch * 1e3 for count, some in counts.items()}
        for kind, counts in runs.items()
    }


def net(
    times: Mapping[LayerKind, Mapping[int, float]], layers: Mapping[LayerKind, int]
) -> dict[LayerKind, tuple[tuple[int, float], ...]]:
    """From passes in milliseconds to layers: an embedding's is the pass itself and little more."""
    each = times.get("embedding", {}).get(1, 0.0)
    found = {
        kind: tuple((n, round(max(LEAST_MS, (ms - each) / layers[kind]), 5)) for n, ms in sorted(points.items()))
        for kind, points in times.items()
    }
    return {PASS: ((1, round(each, 5)),), **found} if each else found


class Work:
    """A made-up shard at work."""

    def __init__(
        self, outline: Outline, mockup: Mockup, sampler: Sampler, check: Check, place: Place = PROCESSORS
    ) -> None:
        self._outline, self._mockup, self._sampler, self._check = outline, mockup, sampler, check
        self._place = place
        self._is_head = mockup.first == outline.head
        check()
        self._shard: Shard = outline.build(mockup)
        self._rewinds = True
        self._fill = FILL if mockup.context > FILL else mockup.context // 2
        self._next: list[int] = []  # each sequence's next position
        self._draws = [Draw(Sampling(), 0, ())] * mockup.sequences
        longest = 0 if self._is_head else min(mockup.context, CHUNK)  # into the head travels one token a sequence
        counts = [n for n in reversed(SEQUENCES) if n <= mockup.sequences] + [n for n in CHUNKS if n <= longest]
        self.counts = list(dict.fromkeys((counts[0], counts[-1], *counts)))  # in the order of their importance
        self._samples: dict[int, list[Run]] = {count: [] for count in self.counts}
        self._fill_all()

    def enough(self, until: float) -> dict[int, list[Run]]:
        """Runs by count, each timed as often as its budget says; all in turn, so that a disturbance meets all.

        Each after a pause: of a request's time a stage computes in a part only.
        """
        pending = list(self.counts)
        while pending:
            for count in list(pending):
                if self._over(until):
                    return self._samples
                if self._samples[count]:
                    time.sleep(min(PAUSE * self._samples[count][-1].wall_s, PAUSE_S))
                self._run(count)
                first, *others = (run.wall_s for run in self._samples[count])
                spent = sum(others)
                if (len(others) >= MIN_RUNS and spent >= BUDGET_S) or first + spent >= LONG_S:
                    pending.remove(count)
        return self._samples

    def rounds(self, until: float) -> dict[int, list[Run]]:
        """Runs by count, all in turn until the time is over; the first turn may take a little longer.

        Short ones, which steps are made of, have several runs in each of their turns.
        """
        while True:
            for count in self.counts:
                began = time.perf_counter()
                for again in range(MOST_IN_TURN):
                    if self._over(until if self._samples[self.counts[-1]] else until + GRACE_S):
                        return self._samples
                    if again and time.perf_counter() - began > TURN_S:
                        break
                    if self._samples[count]:
                        time.sleep(min(self._samples[count][-1].wall_s, PAUSE_S))
                    self._run(count)

    def _over(self, until: float) -> bool:
        """Whether the time is; but the fewest tokens and the most are timed in any case, what lies between follows."""
        return time.perf_counter() >= until and all(self._samples[count] for count in self.counts[:2])

    def close(self) -> None:
        self._shard.close()
        del self._shard
        return_memory()

    def _run(self, count: int) -> None:
        self._check()
        if count > SEQUENCES[0]:
            rows, segments = self._rows(count), [Segment(self._mockup.sequences, 0, count)]
            run = self._timed(rows, segments)
        else:
            run = self._steps(count)
        self._samples[count].append(run)

    def _steps(self, count: int) -> Run:
        """One token each of `count` sequences, at the same place again and again where the layer can go back."""
        if any(place >= self._mockup.context for place in self._next[:count]):
            self._fill_all()
        segments = [Segment(slot, self._next[slot], 1, self._is_head) for slot in range(count)]
        try:
            run = self._timed(self._rows(count), segments)
        except EngineError:
            if not self._rewinds:
                raise
            self._rewinds = False  # a recurrent layer only goes on
            self._fill_all()
            return self._steps(count)
        if not self._rewinds:
            for slot in range(count):
                self._next[slot] += 1
        return run

    def _timed(self, rows: torch.Tensor, segments: Sequence[Segment]) -> Run:
        started, busy = time.perf_counter(), time.thread_time()
        output = self._shard.forward(rows, segments)
        if self._is_head:
            self._sampler(output, self._draws[: len(segments)])
        self._place.wait()
        wall_s = time.perf_counter() - started
        # While an accelerator computes this thread does not: processor time would say little.
        return Run(wall_s, wall_s if self._place.accelerator else time.thread_time() - busy)

    def _fill_all(self) -> None:
        """Give every sequence what it holds while its next token is timed: one token each at once, then the rest."""
        slots, started = range(self._mockup.sequences), time.perf_counter()
        self._check()
        if self._place.accelerator:  # whose first pass takes long
            self._shard.forward(self._rows(len(slots)), [Segment(slot, 0, 1) for slot in slots])
            started = time.perf_counter()
        self._shard.forward(self._rows(len(slots)), [Segment(slot, 0, 1) for slot in slots])
        each = (time.perf_counter() - started) / len(slots)
        if each * self._fill * len(slots) > FILL_S:  # what attention adds is little beside a layer so slow
            fewer = int(FILL_S / each / len(slots))
            self._fill = fewer if fewer >= LEAST_FILL else 1
        for slot in slots:
            for start in range(1, self._fill, CHUNK):
                self._check()
                length = min(CHUNK, self._fill - start)
                self._shard.forward(self._rows(length), [Segment(slot, start, length)])
        self._next = [self._fill] * len(slots)

    def _rows(self, count: int) -> torch.Tensor:
        """Token ids int64 [count], or hidden states [count, hidden]."""
        if self._mockup.first == 0:
            return torch.randint(0, self._outline.vocabulary, (count,))
        return torch.randn(count, self._outline.hidden_size)
