"""A backend whose shards compute by arithmetic, block, or fail on purpose; and an engine over it, in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peerllm.engine.base import Draw, Progress, StateForms, Tensor
from peerllm.engine.messages import (
    Configure,
    Configured,
    Facts,
    Inspect,
    Inspected,
    LayersTimed,
    LoadStage,
    Measure,
    Measured,
    Submit,
    TimeLayers,
    Tokens,
)
from peerllm.engine.process.engine_line import MemoryChannel
from peerllm.engine.process.runtime import Engine
from peerllm.errors import EngineError
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.identity import load_or_create
from peerllm.types import Sampling

VOCABULARY = 1000
DEPLOYMENT = "ab" * 16
PASS_S = 1e-4  # a real pass lets go of Python's lock; one that never does leaves the engine's loop no turn


class FakeShard:
    """The next token is the sum of all tokens of the slot, modulo the vocabulary: wrong whenever a slot is."""

    hidden_size, vocabulary, weight_bytes, kv_bytes, reach = 4, VOCABULARY, 1000, 100, None

    def __init__(self, backend: FakeBackend, spec: LoadStage) -> None:
        self.first_layer, self.last_layer = spec.first_layer, spec.last_layer
        self.weights = {id(self): self.weight_bytes}
        self._backend = backend
        self._sums: dict[int, int] = {}
        self.closed = False
        self.batches: list[list[TokenRun]] = []

    def forward(self, inputs: Tensor, runs: Sequence[TokenRun]) -> Tensor:
        self.batches.append(list(runs))
        self._backend.before_forward(self, runs)
        time.sleep(PASS_S)
        rows, start = [], 0
        for each in runs:
            ids = inputs[start : start + each.length]
            start += each.length
            base = 0 if each.position == 0 else self._sums[each.slot]
            self._sums[each.slot] = base + int(ids.sum())
            if each.sample:
                row = np.zeros(VOCABULARY, np.float32)
                row[self._sums[each.slot] % VOCABULARY] = 1
                rows.append(row)
        return np.stack(rows) if rows else np.empty((0, VOCABULARY), np.float32)

    def state_forms(self, first_layer: int, last_layer: int) -> StateForms:
        return StateForms({}, {})

    def release(self, slot: int) -> None:
        self._sums.pop(slot, None)

    def close(self) -> None:
        self.closed = True


def expected(prompt: Sequence[int], count: int) -> list[int]:
    total, ids = sum(prompt), []
    for _ in range(count):
        ids.append(total % VOCABULARY)
        total += ids[-1]
    return ids


class Broke(Exception):
    """What an accelerator fails with for good."""


class FakeBackend:
    broken = (Broke,)

    def __init__(self) -> None:
        self.shards: list[FakeShard] = []
        self.before_forward: Callable[[FakeShard, Sequence[TokenRun]], None] = lambda shard, runs: None
        self.between_passes: Callable[[Callable[[], None]], None] = lambda check: check()
        self.before_load: Callable[[LoadStage, Progress], None] = lambda spec, progress: None

    def sampler(self, logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        assert logits.shape[0] == len(draws)
        return logits.argmax(1).tolist()

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        return Facts(1, {}, ("fake",), ("float32",))

    def load(self, spec: LoadStage, progress: Progress) -> FakeShard:
        self.before_load(spec, progress)
        self.shards.append(FakeShard(self, spec))
        return self.shards[-1]

    def inspect(self, message: Inspect) -> Inspected:
        raise ZeroDivisionError("a damaged\nmodel")

    def measure(self, message: Measure) -> Measured:
        return Measured(message.request, {}, {})

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        self.between_passes(check)
        return LayersTimed(message.request, {}, {})


class Line:
    """The daemon's end of an engine in this process."""

    def __init__(self, channel: MemoryChannel) -> None:
        self.channel = channel
        self.heard: list[Any] = []
        self.serving: asyncio.Task[None] | None = None  # the engine
        self._requests = 0

    def request(self) -> int:
        self._requests += 1
        return self._requests

    async def until(self, wanted: Callable[[Any], bool], timeout_s: float = 60) -> Any:
        """The first message heard, past or to come, that is wanted."""
        for message in self.heard:
            if wanted(message):
                return message
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.channel.receive()
                assert message is not None, "the engine closed the line"
                self.heard.append(message)
                if wanted(message):
                    return message

    async def ask(self, message: Any, timeout_s: float = 60) -> Any:
        self.channel.send(message)
        return await self.until(lambda m: getattr(m, "request", None) == message.request, timeout_s)

    def submit(self, sequence: int, prompt: Sequence[int], count: int, deployment: str = DEPLOYMENT) -> None:
        self.channel.send(Submit(deployment, sequence, tuple(prompt), count, (), Sampling()))

    async def finished(self, sequence: int) -> tuple[list[int], Tokens]:
        def mine(m: Any) -> bool:
            return isinstance(m, Tokens) and m.sequence == sequence

        end = await self.until(lambda m: mine(m) and m.finish is not None)
        return [i for m in self.heard if mine(m) for i in m.ids], end


def stage(request: int, deployment: str = DEPLOYMENT, **changes: Any) -> LoadStage:
    """The only stage of a deployment."""
    values: dict[str, Any] = {
        "epoch": 1,
        "stage": 0,
        "stages": 1,
        "first_layer": 0,
        "last_layer": 2,
        "config": "{}",
        "tensors": (),
        "dtype": "float32",
        "slots": 4,
        "context": 1_000_000,
        "chunk": 8,
        "micro_batch": 4,
        "upstream": None,
        "downstream": None,
        "head_device": "me",
    } | changes
    return LoadStage(request, deployment, **values)


@asynccontextmanager
async def engine(directory: Path, backend: FakeBackend) -> AsyncIterator[Line]:
    """A configured engine over an in-memory line, closed at the end."""
    identity = load_or_create(directory)
    ours, theirs = MemoryChannel.pair()
    line, running = Line(ours), Engine(theirs, backend)
    serving = line.serving = asyncio.create_task(running.run())
    try:
        configure = Configure(
            line.request(), "me", str(identity.certificate_path), str(identity.key_path), ("127.0.0.1",), 0, 1, ()
        )
        assert isinstance(await line.ask(configure), Configured)
        yield line
    finally:
        ours.close()
        try:
            await asyncio.wait_for(serving, 10)
        except EngineError:
            pass
        await running.close()
        await running.close()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")]
    assert not left, left
