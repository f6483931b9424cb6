"""What a coordinator reaches of its device and household (negotiation.Surroundings), over the real ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from peerllm.daemon.control_messages import Answer, Computing, DeploymentView, Hello, LoadQuestion, MakeWay
from peerllm.daemon.decide.assignments import Address
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.decide.hub_places import HubPlaces, hub_key
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.deployment import model_files
from peerllm.daemon.deployment.model_files import ModelOnDisk, Tell
from peerllm.daemon.deployment.negotiation import RELEASE_TIMEOUT_S, unless_error
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.engine_link.engine_host import AVAILABLE, EngineHost
from peerllm.daemon.network import Network
from peerllm.daemon.settings import Settings
from peerllm.daemon.threads import Progress
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.hub_outline import Outlines
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import Cancel, Inspect, Inspected, Submit, Switch, TensorAt
from peerllm.errors import PeerLLMError
from peerllm.types import DeploymentId, DeviceId, LinkProfile

INSPECT_TIMEOUT_S = 300.0
MAKE_WAY_TIMEOUT_S = RELEASE_TIMEOUT_S + 5.0
SWITCH_TIMEOUT_S = 600.0  # long prompts may have to be computed again


class Parts(Protocol):
    """What is needed of the daemon."""

    settings: Settings
    network: Network
    host: EngineHost
    ledger: Ledger
    worker: Worker
    digests: Digests
    store: WeightStore

    def hello(self) -> Hello: ...

    def poke(self) -> None: ...


class Home:
    """The surroundings of a real device. Questions to this device itself go to its own worker, without a link."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.me: DeviceId = parts.network.identity.device
        self._gguf_cache = parts.settings.data_dir / model_files.GGUF_CACHE
        self.outlines = Outlines(parts.settings.data_dir / model_files.OUTLINES)

    def name(self, device: DeviceId) -> str:
        return self._parts.hello().name if device == self.me else self._parts.network.name(device)

    def candidates(self) -> dict[DeviceId, Candidate]:
        parts = self._parts
        found: dict[DeviceId, Candidate] = {}
        hops: dict[DeviceId, dict[DeviceId, LinkProfile]] = {}
        for (a, b), figure in parts.network.link_monitor.figures().items():
            hops.setdefault(a, {})[b] = figure.profile
        if parts.host.state in AVAILABLE and not parts.ledger.leaving:
            here = hops.get(self.me, {})
            found[self.me] = Candidate(self.me, parts.hello(), parts.ledger.free_bytes, 0.0, None, hops=here)
        for device, peer in parts.network.peers().items():
            hello, view = peer.hello, peer.view
            if peer.state != "online" or hello is None or view is None or view.leaving:
                continue
            if view.engine in AVAILABLE:
                free = hello.lent_bytes - view.promised_bytes
                ways = hops.get(device, {})
                found[device] = Candidate(device, hello, free, peer.rtt_ms, peer.mbps, hops=ways)
        return found

    def absent(self) -> list[str]:
        here = self.candidates()
        return [peer.name for device, peer in self._parts.network.peers().items() if device not in here]

    def address(self, device: DeviceId) -> Address:
        peer = self._parts.network.peers().get(device)
        return (peer.hosts, peer.data_port) if peer is not None else ((), 0)

    async def ask(self, device: DeviceId, question: LoadQuestion, timeout_s: float) -> Answer:
        if device == self.me:
            return await self._parts.worker.answer(device, question)
        try:
            return await self._parts.network.ask(device, question, timeout_s)
        except PeerLLMError as error:
            free = getattr(error, "free_bytes", None)
            if free is None:  # not the device's answer: the way to it is the trouble
                raise
            return Answer(0, type(error).__name__, str(error), free)

    async def make_way(self, device: DeviceId, deployment: DeploymentId) -> None:
        unless_error(await self._parts.network.ask(device, MakeWay(deployment), MAKE_WAY_TIMEOUT_S), self.name(device))

    def looked_up(self, model: str, tell: Tell) -> AbstractAsyncContextManager[ModelOnDisk]:
        return model_files.looked_up(model, self._gguf_cache, tell)

    async def resolve(self, model: str, progress: Progress, total_bytes: int) -> Path:
        return await model_files.resolve(model, self._gguf_cache, progress, total_bytes)

    async def inspect(self, model_dir: Path, dtype: str, quantize: str) -> Inspected:
        host = self._parts.host
        answer = await host.ask(Inspect(host.next_request(), str(model_dir), dtype, quantize), INSPECT_TIMEOUT_S)
        assert isinstance(answer, Inspected)
        return answer

    async def hashes(self, tensors: Iterable[TensorAt], progress: Progress) -> dict[str, str]:
        wanted = list(tensors)
        inherited = {one.name: Path(one.path).name for one in wanted if self._parts.store.keeps(one)}
        wanted = [one for one in wanted if one.name not in inherited]
        return inherited | (await self._hashed(wanted, progress) if wanted else {})

    async def _hashed(self, wanted: list[TensorAt], progress: Progress) -> dict[str, str]:
        if (hub := await self.hub_places(wanted)) is not None:  # "" where nobody has fetched it yet
            keys = {t.name: hub_key(hub.origin, hub.files[t.path], t.offset, t.nbytes) for t in wanted}
            return {name: self._parts.store.known(key) for name, key in keys.items()}
        found = await self._parts.digests.of(wanted, lambda done, total: progress(done / max(1, total)))
        return {tensor.name: found[tensor.path, tensor.offset, tensor.nbytes] for tensor in wanted}

    async def hub_places(self, tensors: Iterable[TensorAt]) -> HubPlaces | None:
        return await asyncio.to_thread(self.outlines.places, {tensor.path for tensor in tensors})

    def own_tensors(self, tensors: Mapping[str, TensorAt]) -> dict[str, TensorAt]:
        """The tensors whose bytes lie in files of this device; those of an outline do not."""
        return {name: tensor for name, tensor in tensors.items() if not self.outlines.holds(tensor.path)}

    def tell_engine(self, message: Submit | Cancel) -> None:
        self._parts.host.tell(message)

    def tell_device(self, device: DeviceId, message: Computing) -> None:
        self._parts.network.tell(device, message)

    def switch(self, deployment: DeploymentId, epoch: int) -> Awaitable[None]:
        host = self._parts.host
        return host.put(Switch(host.next_request(), deployment, epoch), SWITCH_TIMEOUT_S)

    def views(self) -> Iterable[DeploymentView]:
        peers = self._parts.network.peers().values()
        return [view for peer in peers if peer.view is not None for view in peer.view.deployments]

    def changed(self) -> None:
        self._parts.poke()
