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
    CarryState,
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
from peerllm.errors import LinkError, NotFoundError, RefusedError
from peerllm.reused_layers import reused
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
        self.shards: dict[tuple, tuple[int, set[int]]] = {}  # (deployment, layers, size): bytes, and who uses it
        self.epochs: dict[tuple[str, int], set[int]] = {}  # (deployment, epoch): stages
        self.carried: list[object] = []
        self.seen: list[object] = []
        self.gate = asyncio.Event()  # loads wait for it
        self.gate.set()
        self.loading = asyncio.Event()
        self.loaded: list[tuple[int, int]] = []  # shards, in the order in which they were loaded
        self.unloads = 0
        self.fail: Exception | None = None
        self.failures: list[Exception] = []  # those of the next loads
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
        return sum(nbytes for nbytes, _ in self.shards.values())

    @property
    def stages(self):
        return {(deployment, stage) for (deployment, _), stages in self.epochs.items() for stage in stages}

    def clear(self):
        self.shards.clear()
        self.epochs.clear()

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
                if self.failures:
                    raise self.failures.pop(0)
                if self.fail is not None:
                    raise self.fail
                nbytes = self._load(message)
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
                held = tuple((deployment, stage, 0) for deployment, stage in sorted(self.stages))
                paces = {f"{deployment}/{stage}": self.paces for deployment, stage, _ in held if self.paces}
                by_deployment = {
                    one: sum(n for key, (n, _) in self.shards.items() if key[0] == one) for one, _, _ in held
                }
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
                self._unload(message)
            case CarryState():
                assert (message.deployment, message.epoch) in self.epochs, "what is carried is not here"
                self.carried.append(message)
            case Connect():
                assert (message.deployment, message.epoch) in self.epochs, "connected before it was loaded"
        return Done(message.request)

    def _load(self, spec):
        """Bytes that are new: shards that lie within the stage are used again."""
        size, layers = (spec.slots, spec.context), (spec.first_layer, spec.last_layer)
        there = [key[1] for key in self.shards if key[0] == spec.deployment and key[2] == size]
        used, missing = reused(layers, there)
        each = {t.name: t.nbytes for t in spec.tensors}
        sizes = [each[name] for name in each]
        new = 0
        for first, last in missing:
            nbytes = sum(sizes[first - spec.first_layer : last - spec.first_layer + 1])
            if self.most is not None and nbytes > self.most:
                raise RefusedError(f"a stage of {nbytes} bytes does not fit")
            new += nbytes
        assert spec.limit_bytes >= new, "more is loaded than there is room for"
        if spec.added_limit_bytes < new:
            raise RefusedError(f"{new} bytes are asked for, {spec.added_limit_bytes} are promised")
        for first, last in missing:
            nbytes = sum(sizes[first - spec.first_layer : last - spec.first_layer + 1])
            self.shards[spec.deployment, (first, last), size] = nbytes, set()
            self.loaded.append((first, last))
        for one in (*used, *missing):
            self.shards[spec.deployment, one, size][1].add(spec.epoch)
        self.epochs.setdefault((spec.deployment, spec.epoch), set()).add(spec.stage)
        return new

    def _unload(self, message):
        def over(epoch):
            return message.epoch is None or (epoch == message.epoch if message.only else epoch <= message.epoch)

        for key, (_, epochs) in list(self.shards.items()):
            if key[0] == message.deployment:
                epochs -= {one for one in epochs if over(one)}
                if not epochs:
                    del self.shards[key]
        self.epochs = {key: one for key, one in self.epochs.items() if key[0] != message.deployment or not over(key[1])}


class FakeStore:
    """Fetches nothing and says it did (StageWeights)."""

    def __init__(self, own_tensors, me):
        self.used = set()
        self.fetching = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._own, self._me = own_tensors, me
        self.damaged: list[bool] = []  # what the next looks at the bytes find

    async def fetch(self, assign, coordinator, told):
        own = self._own(assign.deployment) if coordinator == self._me else {}
        wanted = {tensor.name: tensor for work in assign.work for tensor in work.tensors}
        if missing := [tensor for name, tensor in wanted.items() if name not in own]:
            self.used.add(assign.deployment)
            self.fetching.set()
            await self.gate.wait()
            told("fetch", 1, 1)
        return {name: one for name, one in own.items() if name in wanted} | {
            one.name: TensorAt(one.name, one.dtype, one.shape, f"/kept/{one.sha256}", 0, one.nbytes) for one in missing
        }

    async def verify(self, tensors, told):
        return not (self.damaged and self.damaged.pop(0))

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
    computing: list = field(default_factory=list)
    switched: list = field(default_factory=list)

    def __post_init__(self):
        self.ledger = Ledger(self.lent)
        self.engine = FakeEngine(self.house, self.me)
        self.coordinator = self._coordinator()
        self.store = FakeStore(self.coordinator.own_tensors, self.me)
        self.worker = Worker(
            self.me,
            self.ledger,
            self.engine,
            self.store,
            Profiler(
                self.engine, lambda: self.ledger.free_bytes, self.me[:4], self.house.folder / f"{self.me[:4]}.profiles"
            ),
            address=lambda device: (("127.0.0.1",), 1),
            report=self.report,
            changed=self.tell,
        )

    def tell(self):
        """As a DeviceView: the others hear what is loaded here."""
        for one in self.house.devices.values():
            if self.online and one.online and one is not self:
                one.coordinator.told(self.me, self.worker.holdings())
        self.house.changed()

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

    async def make_way(self, device, deployment):
        await self.house.devices[device].coordinator.make_way(deployment)

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

    async def hub_places(self, tensors):
        return self.house.hub_places

    def tell_engine(self, message):
        self.told.append(message)
        self.house.changed()

    def tell_device(self, device, message):
        self.computing.append((device, message))

    def switch(self, deployment, epoch):
        self.switched.append(epoch)

        async def done():
            await self.house.switch_gate.wait()

        return done()

    def _coordinator(self):
        return Coordinator(self, self.house.folder / f"{self.me[:4]}.jsonl")

    def restarted(self):
        """A new coordinator, which knows of the old one's deployments what the file says."""
        known, self.coordinator = self.coordinator._devices, self._coordinator()
        for event in known.values():
            self.coordinator.device_is(event.device, event.condition, event.reason)
        self.store._own = self.coordinator.own_tensors
        return self.coordinator

    def views(self):
        others = [d for d in self.house.devices.values() if d is not self and self.house.views_travel]
        return [v for d in others for v in d.coordinator.views()]

    def changed(self):
        self.house.changed()
        for one in self.house.devices.values():
            if one is not self and self.house.views_travel:
                asyncio.get_running_loop().call_soon(one.coordinator.look_for_others)


class House:
    """Devices "a", "b", ... lending what `lent` says; `models` by name."""

    def __init__(self, folder, lent, models):
        self.folder, self.models = folder, models
        self.forms: dict[str, str] = {}  # of a model's GGUF files
        self.to_download: dict[str, int] = {}  # bytes of a model that are not on the source's disk yet
        self.downloads: list[str] = []
        self.download_gate = asyncio.Event()  # downloads wait for it
        self.download_gate.set()
        self.views_travel = True  # what devices say of their deployments reaches the others
        self.switch_gate = asyncio.Event()  # engines' sequences change their epoch when it is open
        self.switch_gate.set()
        self.hub_places = None
        self.devices: dict[str, Device] = {}
        self._departures: dict[str, asyncio.Event] = {}
        self._changes = asyncio.Event()
        for letter, nbytes in zip("abcdefgh", lent, strict=False):
            device = letter * 64
            self.devices[device] = Device(self, device, nbytes)
        for one in self.devices.values():
            for device in self.devices:
                one.coordinator.device_is(device, "online")

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
        gone.engine.clear()
        gone.worker.engine_lost("the daemon died")
        self.part(letter, "gone")

    def part(self, letter, condition="silent"):
        """The device is not heard of any more; what it has loaded stays."""
        gone = self[letter]
        gone.online = False
        if condition == "gone":
            self.departure(gone.me).set()
        for device in self.devices.values():
            if device is not gone:
                device.coordinator.device_is(gone.me, condition, f"is {condition}")
                device.worker.away(gone.me)

    async def come_back(self, letter):
        self[letter].online = True
        self._departures.pop(self[letter].me, None)
        for device in self.devices.values():
            if device is not self[letter]:
                device.coordinator.told(self[letter].me, self[letter].worker.holdings())
                device.coordinator.device_is(self[letter].me, "online")
                device.worker.back(self[letter].me)
                self[letter].worker.back(device.me)

    async def close(self):
        for device in self.devices.values():
            await device.coordinator.close()
        for device in self.devices.values():
            await device.worker.close()


def quiet(_):
    """Whoever is told of progress does not care."""


def view(device):
    """The one deployment that runs from this device."""
    (only,) = device.coordinator.views()
    return only


def used(device):
    """The letters of the devices that it uses."""
    return {stage.device[0] for stage in view(device).stages}
