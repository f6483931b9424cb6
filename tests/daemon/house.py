"""A household in memory: real workers, ledgers and coordinators; engines that keep books; calls for links."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from peerllm.daemon.control_messages import Hello
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.model_files import ModelOnDisk
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.engine_link.profiler import Profiler
from peerllm.engine.messages import (
    Connect,
    Done,
    EngineLoad,
    Inspected,
    LayersTimed,
    LoadProgress,
    LoadStage,
    QueryLoad,
    Record,
    Recorded,
    TensorAt,
    TimeLayers,
    Unload,
)
from peerllm.errors import EngineError, LinkError, NotFoundError, RefusedError
from peerllm.types import Layer, ModelProfile, WorkingSpace

BLOCK = 1_000_000  # bytes of one block of the toy models
LAYER_MS = {
    "pass": ((1, 0.1),), "embedding": ((1, 0.01),), "block": ((1, 1.0), (128, 9.0)), "head": ((1, 0.5),),
    "attention:block": ((1, 0.01), (128, 0.1)),
}  # fmt: skip
CONFIG = '{"num_attention_heads": 1, "intermediate_size": 8}'
WORKING = WorkingSpace(token=500, pair=4, position=0, sequence=128, once=1024, loading=0)


def hello(name, lent, machine=""):
    speed = {"float32": 10.0}, {"float32": 50.0}
    return Hello(1, "0", {}, name, 1, 2, lent * 2, lent, *speed, ("llama",), ("float32",), machine, processors=2)


def inspected(name, blocks, max_context=64):
    """A toy model: `blocks` blocks of BLOCK bytes each, small ends, no KV to speak of."""
    sizes = [1000, *[BLOCK] * blocks, 1000]
    kinds = ["embedding", *["block"] * blocks, "head"]
    layers = tuple(Layer(f"l{i}", kind, size, 1, 8) for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True)))
    tensors = tuple(
        (TensorAt(f"{name}.{i}", "F32", (size // 4,), "/nowhere", 0, size),) for i, size in enumerate(sizes)
    )
    profile = ModelProfile(name, layers)
    return Inspected(0, profile, "llama", CONFIG, "float32", 8, 16, max_context, (2,), tensors, WORKING)


class FakeEngine:
    """Takes the memory a stage says it needs when it is loaded, and gives it back when it is unloaded."""

    def __init__(self, house, device):
        self._house, self._device = house, device
        self._numbers = itertools.count(1)
        self.stages: dict[tuple[str, int], int] = {}
        self.seen: list[object] = []
        self.gate = asyncio.Event()  # loads wait for it
        self.gate.set()
        self.loading = asyncio.Event()
        self.unloads = 0
        self.fail: Exception | None = None
        self.most: int | None = None  # bytes of one stage; it refuses more
        self.layer_ms = dict(LAYER_MS)  # what timing layers finds, or why it cannot
        self.timing = None  # called with each TimeLayers before it is answered
        self.paces = ()  # what each stage says that batches of steps take, and how far they vary
        self.clock_ahead_ns = 0
        self.recorded = {}  # by deployment: what is told part by part, or why nothing is

    def next_request(self):
        return next(self._numbers)

    @property
    def held(self):
        return sum(self.stages.values())

    def clock(self):
        return time.perf_counter_ns() + self.clock_ahead_ns

    async def ask(self, message, timeout_s):
        self.seen.append(message)
        self._house.check()
        await asyncio.sleep(0)
        match message:
            case LoadStage():
                self.loading.set()
                before = self.unloads
                await self.gate.wait()
                if self.unloads != before:
                    raise RefusedError("the deployment was stopped while it was loading")
                if self.fail is not None:
                    raise self.fail
                nbytes = sum(tensor.nbytes for tensor in message.tensors)
                if self.most is not None and nbytes > self.most:
                    raise RefusedError(f"a stage of {nbytes} bytes does not fit")
                self.stages[message.deployment, message.stage] = nbytes
                self._house.check()
                self._house.devices[self._device].worker.progress(
                    LoadProgress(message.deployment, message.stage, nbytes, nbytes)
                )
            case TimeLayers():
                if self.timing is not None:
                    await self.timing(message)
                if isinstance(self.layer_ms, Exception):
                    raise self.layer_ms
                return LayersTimed(message.request, self.layer_ms, {})
            case QueryLoad():
                held = tuple((deployment, stage, 0) for deployment, stage in self.stages)
                paces = {f"{deployment}/{stage}": self.paces for deployment, stage, _ in held if self.paces}
                by_deployment = {one: sum(n for key, n in self.stages.items() if key[0] == one) for one, _, _ in held}
                return EngineLoad(
                    message.request,
                    held,
                    self.held,
                    0,
                    self.held,
                    paces=paces,
                    held_bytes=by_deployment,
                )
            case Record():
                if message.want == "take":
                    parts = self.recorded.get(message.deployment) or [()]
                    if isinstance(parts, Exception):
                        raise parts
                    spans, left = parts[0], sum(map(len, parts[1:]))
                    self.recorded[message.deployment] = parts[1:]
                    return Recorded(message.request, self.clock(), spans, left)
                return Recorded(message.request, self.clock())
            case Unload():
                self.unloads += 1
                self.gate.set()
                self.stages = {key: value for key, value in self.stages.items() if key[0] != message.deployment}
            case Connect():
                assert any(key[0] == message.deployment for key in self.stages), "connected before it was loaded"
        return Done(message.request)


class FakeStore:
    """Fetches nothing and says it did."""

    def __init__(self):
        self.used = set()
        self.fetching = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, deployment, source, tensors, progress):
        self.used.add(deployment)
        self.fetching.set()
        await self.gate.wait()
        progress(1, 1)

    def path(self, sha256):
        return Path("/kept") / sha256

    def forget(self, deployment):
        self.used.discard(deployment)


@dataclass
class Device:
    """One device, and what a coordinator on it reaches (negotiation.Surroundings)."""

    house: House
    me: str
    lent: int
    online: bool = True
    machine: str = ""
    told: list = field(default_factory=list)
    offers: dict = field(default_factory=dict)

    def __post_init__(self):
        self.ledger = Ledger(self.lent)
        self.engine = FakeEngine(self.house, self.me)
        self.store = FakeStore()
        self.coordinator = Coordinator(self, self.house.folder / f"{self.me[:4]}.jsonl")
        self.worker = Worker(
            self.me,
            self.ledger,
            self.engine,
            self.store,
            Profiler(
                self.engine, lambda: self.ledger.free_bytes, self.me[:4], self.house.folder / f"{self.me[:4]}.profiles"
            ),
            own_tensors=self.coordinator.own_tensors,
            address=lambda device: (("127.0.0.1",), 1),
            report=self.report,
            changed=self.house.changed,
        )

    def report(self, coordinator, message):
        if self.online:
            self.house.devices[coordinator].coordinator.hear(self.me, message)

    def name(self, device):
        return f"device-{device[0]}"

    def candidates(self):
        return {
            device: Candidate(
                device, hello(self.name(device), one.lent, one.machine), one.ledger.free_bytes, 1.0, 1000.0
            )
            for device, one in self.house.devices.items()
            if one.online
        }

    def absent(self):
        return [self.name(device) for device, one in self.house.devices.items() if not one.online]

    def address(self, device):
        return ("127.0.0.1",), 1

    async def ask(self, device, question, timeout_s):
        other = self.house.devices[device]
        await asyncio.sleep(0)
        if not (other.online and self.online):
            raise LinkError(f"{self.name(device)} does not answer")
        answering = asyncio.ensure_future(other.worker.answer(self.me, question))
        leaving = asyncio.ensure_future(self.house.departure(device).wait())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise LinkError(f"{self.name(device)} does not answer")
            self.house.check()
            return answering.result()
        finally:
            answering.cancel()
            leaving.cancel()

    @asynccontextmanager
    async def looked_up(self, model, tell):
        if model not in self.house.models:
            raise NotFoundError(f"{model}: no such directory")
        missing = self.house.to_download.get(model, 0)
        place = Path("/outlines" if missing else "/models")
        yield ModelOnDisk(place / model, missing, self.house.forms.get(model, ""))

    async def resolve(self, model, progress, total_bytes):
        assert total_bytes == self.house.to_download[model]
        self.house.downloads.append(model)
        progress(0.4)
        await self.house.download_gate.wait()
        return Path("/models") / model

    async def inspect(self, model_dir, dtype, quantize):
        return self.house.models[model_dir.name]

    async def hashes(self, tensors, progress):
        return {tensor.name: f"{abs(hash(tensor.name)):064x}"[-64:] for tensor in tensors}

    def offer(self, deployment, tensors):
        self.offers[deployment] = tensors

    def withdraw(self, deployment):
        self.offers.pop(deployment, None)

    def tell_engine(self, message):
        self.told.append(message)
        self.house.changed()

    def views(self):
        return [v for d in self.house.devices.values() if d is not self for v in d.coordinator.views()]

    def changed(self):
        self.house.changed()


class House:
    """Devices "a", "b", ... lending what `lent` says; `models` by name."""

    def __init__(self, folder, lent, models):
        self.folder, self.models = folder, models
        self.forms: dict[str, str] = {}  # of a model's GGUF files
        self.to_download: dict[str, int] = {}  # bytes of a model that are not on the source's disk yet
        self.downloads: list[str] = []
        self.download_gate = asyncio.Event()  # downloads wait for it
        self.download_gate.set()
        self.devices: dict[str, Device] = {}
        self._departures: dict[str, asyncio.Event] = {}
        self._changes = asyncio.Event()
        for letter, nbytes in zip("abcdefgh", lent, strict=False):
            device = letter * 64
            self.devices[device] = Device(self, device, nbytes)

    def __getitem__(self, letter):
        return self.devices[letter * 64]

    def departure(self, device):
        return self._departures.setdefault(device, asyncio.Event())

    def changed(self):
        self.check()
        self._changes.set()

    def check(self):
        """No more is promised than lent, no more is held than promised; at every instant."""
        for device in self.devices.values():
            assert device.ledger.promised_bytes <= device.lent
            assert device.engine.held <= device.ledger.promised_bytes, "memory is held that nobody promised"

    def empty(self):
        return all(
            not d.engine.stages and not d.ledger.promised_bytes and not d.store.used for d in self.devices.values()
        )

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                self._changes.clear()
                await self._changes.wait()

    async def vanish(self, letter):
        """The device's daemon dies; the others notice."""
        gone = self[letter]
        gone.online = False
        self.departure(gone.me).set()
        gone.engine.stages.clear()
        gone.worker.engine_lost("the daemon died")
        for device in self.devices.values():
            if device is not gone:
                device.coordinator.gone(gone.me, "it vanished")
                await device.worker.vanished(gone.me)

    async def come_back(self, letter):
        self[letter].online = True
        self._departures.pop(self[letter].me, None)
        for device in self.devices.values():
            device.coordinator.stir()

    async def close(self):
        for device in self.devices.values():
            await device.coordinator.close()
        for device in self.devices.values():
            await device.worker.close()


__all__ = ["BLOCK", "EngineError", "House", "hello", "inspected"]
