"""Milliseconds per kind of layer at several token counts, by the very passes that a stage makes (base.Shard.forward).

Timing depends on shapes alone, so one layer at a time is made up from the configuration, and a device too small for the
model is timed like any other. A stage costs a pass (masks, positions, the model's own walk) and its layers: the pass is
told apart, as the kind "pass", and layers are net of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Draw, Sampler
from peerllm.engine.free_memory import return_memory
from peerllm.engine.measure.outline import CHUNK, SEQUENCES, Mockup, Sizes
from peerllm.engine.messages import PASS, LayersTimed, TimeLayers
from peerllm.errors import EngineError, RefusedError
from peerllm.transport.frames import TokenRun
from peerllm.types import LayerKind, Sampling

CHUNKS = (32, CHUNK)  # tokens of one prompt; up to SEQUENCES[0] tokens are one each of as many sequences
FILL = 96  # tokens that a sequence holds while its next one is timed
FILL_S = 0.1  # to fill sequences in; those left over are timed behind their first token
RUNS = 7  # per kind and count ...
RUNS_S = 0.08  # ... but no more of slow ones than this takes
LIMIT_S = 6.0  # for all kinds, building them included: large models; counts left out follow from the others
PAUSE, PAUSE_S = 2, 0.008  # passes, at most so long: a stage waits for the others, and wakes up with cold caches
LEAST_MS = 1e-4  # what is left of a layer where timing cannot tell it from the pass

Check = Callable[[], None]
Clock = Callable[[], float]  # seconds


def time_layers(
    message: TimeLayers, outline: Sizes, sampler: Sampler, check: Check, clock: Clock = time.perf_counter
) -> LayersTimed:
    """One kind after the other. `check` is called before every pass and raises when timing shall end.

    `clock` says how long passes take: `time.thread_time`, where this thread alone computes, leaves out what strangers
    on its processor add.
    """
    end = time.perf_counter() + LIMIT_S
    times: dict[LayerKind, dict[int, float]] = {}
    layers: dict[LayerKind, int] = {}
    skipped: dict[LayerKind, str] = {}
    for number, kind in enumerate(outline.kinds):
        now = time.perf_counter()
        until = now + max(0.0, end - now) / (len(outline.kinds) - number)
        try:
            mockup = outline.plan(kind)
            work = Work(outline, mockup, sampler, check, clock)
        except RefusedError as error:
            skipped[kind] = str(error)
            continue
        try:
            times[kind], layers[kind] = work.times(until), mockup.layers
        finally:
            work.close()
    return LayersTimed(message.request, net(times, layers), skipped)


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

    def __init__(self, outline: Sizes, mockup: Mockup, sampler: Sampler, check: Check, clock: Clock) -> None:
        self._outline, self._mockup, self._sampler, self._check, self._clock = outline, mockup, sampler, check, clock
        self._is_head = mockup.first == outline.head
        self._random = np.random.default_rng(0)
        check()
        self._shard = outline.build(mockup)
        self._rewinds = True
        self._next: list[int] = []  # each sequence's next position
        self._draws = [Draw(Sampling(), 0, ())] * mockup.sequences
        longest = 0 if self._is_head else min(mockup.context, CHUNK)  # into the head travels one token a sequence
        counts = [n for n in SEQUENCES if n <= mockup.sequences] + [n for n in CHUNKS if n <= longest]
        self.counts = list(dict.fromkeys((1, max(counts), *sorted(counts))))  # in the order of their importance

    def times(self, until: float) -> dict[int, float]:
        """Milliseconds by count. All counts take turns, so that a disturbance meets all; the first run does not count.

        Each after a pause: of a request's time a stage computes in a part only.
        """
        self._fill()
        samples: dict[int, list[float]] = {count: [] for count in self.counts}
        pending = list(self.counts)
        while pending:
            for count in list(pending):
                # The fewest tokens and the most are timed in any case; what lies between follows.
                if time.perf_counter() >= until and all(samples[one] for one in self.counts[:2]):
                    pending.clear()
                    break
                if samples[count]:
                    time.sleep(min(PAUSE * samples[count][-1], PAUSE_S))
                samples[count].append(self._run(count))
                if len(samples[count]) >= RUNS or sum(samples[count]) >= RUNS_S:
                    pending.remove(count)
        return {count: median(some[1:] or some) * 1e3 for count, some in samples.items() if some}

    def close(self) -> None:
        self._shard.close()
        del self._shard
        return_memory()

    def _run(self, count: int) -> float:
        """Seconds of one pass."""
        self._check()
        if count > SEQUENCES[0]:
            return self._timed(count, [TokenRun(0, self._mockup.sequences, 0, count)])
        if any(place >= self._mockup.context for place in self._next[:count]):
            self._fill()
        runs = [TokenRun(slot, slot, self._next[slot], 1, self._is_head) for slot in range(count)]
        try:
            took = self._timed(count, runs)
        except EngineError:
            if not self._rewinds:
                raise
            self._rewinds = False  # a recurrent layer only goes on
            self._fill()
            return self._run(count)
        if not self._rewinds:
            self._next[:count] = [place + 1 for place in self._next[:count]]
        return took

    def _timed(self, count: int, runs: Sequence[TokenRun]) -> float:
        rows = self._rows(count)
        started = self._clock()
        output = self._shard.forward(rows, runs)
        if self._is_head:
            self._sampler(output, self._draws[: len(runs)])
        return self._clock() - started

    def _fill(self) -> None:
        """Give every sequence its first token, and as many sequences as time allows what they hold while timed."""
        slots, length = range(self._mockup.sequences), min(FILL, self._mockup.context // 2)
        self._shard.forward(self._rows(len(slots)), [TokenRun(slot, slot, 0, 1) for slot in slots])
        self._next = [1] * len(slots)
        until = time.perf_counter() + FILL_S
        for slot in slots if length > 1 else ():
            if time.perf_counter() >= until:
                break
            self._check()
            self._shard.forward(self._rows(length - 1), [TokenRun(slot, slot, 1, length - 1)])
            self._next[slot] = length

    def _rows(self, count: int) -> npt.NDArray[Any]:
        """Token ids int64 [count], or hidden states float32 [count, hidden]."""
        if self._mockup.first == 0:
            return self._random.integers(0, self._outline.vocabulary, count)
        return self._random.standard_normal((count, self._outline.hidden_size), dtype=np.float32)
