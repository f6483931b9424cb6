"""Milliseconds per kind of layer at several token counts, by the very passes that a stage makes (base.Shard.forward).

Timing depends on shapes alone, so one layer at a time is made up from the configuration, and a device too small for the
model is timed like any other. A stage costs a pass (masks, positions, the model's own walk) and its layers: the pass is
told apart, as the kind "pass", and layers are net of it. What attention adds for the tokens before is told apart too.
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
from peerllm.engine.measure.compute_speed import WEIGHT_BYTES
from peerllm.engine.measure.outline import CHUNK, SEQUENCES, Mockup, Sizes
from peerllm.engine.messages import FURTHER_TOKENS, PASS, LayersTimed, TimeLayers, attention
from peerllm.errors import RefusedError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import LayerKind, Sampling

RUNS = 4  # per kind and count ...
RUNS_S = 0.05  # ... but no more of slow ones than this takes
STEPS = 6  # behind a prompt, of which the later half counts
LIMIT_S = 6.0  # for all kinds, building them included: large models; counts left out follow from the others
CACHE_BYTES = 128 << 20  # of a stage's other layers, at most: caches hold no more
LEAST_MS = 1e-4  # what is left of a layer where timing cannot tell it from the pass

Check = Callable[[], None]
Clock = Callable[[], float]  # seconds
Points = dict[int, float]  # tokens in a batch: milliseconds


def time_layers(
    message: TimeLayers, outline: Sizes, sampler: Sampler, check: Check, clock: Clock = time.perf_counter
) -> LayersTimed:
    """One kind after the other. `check` is called before every pass and raises when timing shall end.

    `clock` says how long passes take: `time.thread_time`, where this thread alone computes, leaves out what strangers
    on its processor add.
    """
    end = time.perf_counter() + LIMIT_S
    near: dict[LayerKind, Points] = {}
    further: dict[LayerKind, Points] = {}
    mockups: dict[LayerKind, Mockup] = {}
    skipped: dict[LayerKind, str] = {}
    for kind in outline.kinds:
        try:
            mockups[kind] = outline.plan(kind)
        except RefusedError as error:
            skipped[kind] = str(error)
    spare = outline.limit_bytes - max(map(outline.nbytes, mockups.values()), default=0)
    others = np.ones(min(CACHE_BYTES, outline.weight_bytes, max(WEIGHT_BYTES, spare)) // 8 + 1)
    for number, (kind, mockup) in enumerate(mockups.items()):
        now = time.perf_counter()
        until = now + max(0.0, end - now) / (len(mockups) - number)
        try:
            work = Work(outline, mockup, others, sampler, check, clock)
        except RefusedError as error:
            skipped[kind] = str(error)
            continue
        try:
            near[kind], more = work.times(until)
            if kind not in ("embedding", "head"):
                further[kind] = more
        finally:
            work.close()
    return LayersTimed(message.request, net(near, further), skipped)


def net(
    near: Mapping[LayerKind, Points], further: Mapping[LayerKind, Points]
) -> dict[LayerKind, tuple[tuple[int, float], ...]]:
    """From passes to layers: the embedding's pass counts as what any pass costs, and is subtracted (milliseconds)."""
    each = near.get("embedding", {}).get(1, 0.0)

    def of_one(points: Points, besides: float) -> tuple[tuple[int, float], ...]:
        return tuple((n, round(max(LEAST_MS, ms - besides), 5)) for n, ms in sorted(points.items()))

    found = {kind: of_one(points, each) for kind, points in near.items()}
    found |= {attention(kind): of_one(points, 0.0) for kind, points in further.items()}
    return {PASS: ((1, round(each, 5)),), **found} if each else found


def _usual(seconds: Sequence[float]) -> float:
    """Milliseconds: the lower quartile. What else the machine does only ever adds to a pass."""
    return sorted(seconds)[len(seconds) // 4] * 1e3


class Work:
    """A made-up shard at work. Its last slot holds a prompt, the others a sequence each that has just begun.

    `others` stands for what a stage's other layers leave in the caches: it is read before every step.
    """

    def __init__(
        self, outline: Sizes, mockup: Mockup, others: npt.NDArray[Any], sampler: Sampler, check: Check, clock: Clock
    ) -> None:
        self._others = others
        self._outline, self._mockup, self._sampler, self._check, self._clock = outline, mockup, sampler, check, clock
        self._is_head = mockup.layer == outline.head
        self._random = np.random.default_rng(0)
        check()
        self._shard = outline.build(mockup)
        self._next = [0] * mockup.sequences  # each sequence's next position
        self._draws = [Draw(Sampling(), 0, ())] * mockup.sequences
        self.counts = [1]  # in the order of their importance
        if not self._is_head and mockup.context >= CHUNK:  # into the head travels one token a sequence
            self.counts.append(CHUNK)
        if mockup.layer:
            self.counts += [n for n in SEQUENCES if 1 < n <= mockup.sequences]

    def times(self, until: float) -> tuple[Points, Points]:
        """Milliseconds by count: for sequences that have just begun, and what FURTHER_TOKENS before them add.

        All counts take turns, so that a disturbance meets all.
        """
        samples: dict[int, list[tuple[float, ...]]] = {count: [] for count in self.counts}
        pending = list(self.counts)
        while pending:
            for count in list(pending):
                if time.perf_counter() >= until and all(samples[one] for one in self.counts[:2]):
                    pending.clear()  # what lies between the fewest tokens and the most follows
                    break
                if count != CHUNK:
                    self._others.max()
                samples[count].append(self._prompt() if count == CHUNK else (self._step(count),))
                runs, took = len(samples[count]), sum(some[0] for some in samples[count])
                if runs >= RUNS or (runs > 1 and took >= RUNS_S):
                    pending.remove(count)
        near = {count: _usual([some[0] for some in runs]) for count, runs in samples.items() if runs}
        prompts = samples.get(CHUNK, [])
        if not prompts or len(prompts[0]) == 1:
            return near, {1: 0.0}
        _, second, step = zip(*prompts, strict=True)
        chunk_ms, step_ms = _usual(second) - near[CHUNK], median(step) * 1e3
        return near, {1: step_ms * FURTHER_TOKENS / (2 * CHUNK), CHUNK: chunk_ms * FURTHER_TOKENS / CHUNK}

    def close(self) -> None:
        self._shard.close()
        del self._shard
        return_memory()

    def _prompt(self) -> tuple[float, ...]:
        """Seconds of a prompt's first chunk and, where it has room, of its second, and what the tokens of both add to
        a step.
        """
        slot, room = self._mockup.sequences, self._mockup.context
        first = self._pass([TokenRun(slot, slot, 0, CHUNK)])
        if room < 2 * CHUNK + STEPS or not self._mockup.layer:
            return (first,)
        second = self._pass([TokenRun(slot, slot, CHUNK, CHUNK)])
        near, far = [], []
        for place in range(2 * CHUNK, 2 * CHUNK + STEPS):
            near.append(self._step(1))
            far.append(self._pass([TokenRun(slot, slot, place, 1)]))
        # The first of them find in the caches what the chunks have left.
        return first, second, median(far[STEPS // 2 :]) - median(near[STEPS // 2 :])

    def _step(self, count: int) -> float:
        """Seconds of one token each of so many sequences; one whose room is full begins anew."""
        runs = [TokenRun(slot, slot, self._next[slot], 1, self._is_head) for slot in range(count)]
        self._next[:count] = [(place + 1) % self._mockup.context for place in self._next[:count]]
        return self._pass(runs)

    def _pass(self, runs: Sequence[TokenRun]) -> float:
        """Seconds."""
        self._check()
        rows = self._rows(sum(run.length for run in runs))
        started = self._clock()
        output = self._shard.forward(rows, runs)
        if self._is_head:
            self._sampler(output, self._draws[: len(runs)])
        return self._clock() - started

    def _rows(self, count: int) -> npt.NDArray[Any]:
        """Token ids int64 [count], or hidden states float32 [count, hidden]."""
        if self._mockup.layer == 0:
            return self._random.integers(0, self._outline.vocabulary, count)
        return self._random.standard_normal((count, self._shard.hidden_size), dtype=np.float32)
