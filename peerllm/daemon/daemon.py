"""One device's daemon: it owns the network, the engine, what is lent, and the deployments started here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast

from peerllm.daemon.control_messages import DeviceView, DiskModel, Hello
from peerllm.daemon.debounce import Debounce
from peerllm.daemon.decide.device_names import device_called
from peerllm.daemon.decide.device_profiles import link_profiles
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.decide.owner_limits import OwnerLimits
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.loading.epoch_loading import QUERY_TIMEOUT_S
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.engine_events import EngineEvents
from peerllm.daemon.engine_link import machine
from peerllm.daemon.engine_link.device_engine import DeviceEngine
from peerllm.daemon.engine_link.engine_host import IDLE
from peerllm.daemon.facade import (
    Chunk,
    GenerateRequest,
    InheritedAnswer,
    PeerHandler,
    RelayedAnswer,
    RunOptions,
    RunProgress,
    ServedModel,
)
from peerllm.daemon.facade_objects import EngineStatus, HouseholdStatus, LimitsStatus, MeasuredSpeed, Preview
from peerllm.daemon.household_events import HouseholdEvents
from peerllm.daemon.network import Network
from peerllm.daemon.owner.lending import Lending
from peerllm.daemon.owner.limits_file import recalled
from peerllm.daemon.owner.machine_reading import read_machine
from peerllm.daemon.relay import relay_door
from peerllm.daemon.relay.relay_client import RelayClient
from peerllm.daemon.settings import Settings
from peerllm.daemon.shelf.model_shelf import ModelShelf
from peerllm.daemon.status.household_models import HouseholdModels, running_names, startable_models, with_asleep
from peerllm.daemon.status.status import (
    deployments_of,
    engine_entry,
    link_entries,
    own_entry,
    starting_status,
    status_object,
)
from peerllm.daemon.successor.successor import Successor
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.exchange.holders import ROUTE
from peerllm.daemon.weights.exchange.network_peers import NetworkPeers
from peerllm.daemon.weights.hub import token
from peerllm.daemon.weights.offers import Offers
from peerllm.daemon.weights.stage_weights import StageWeights
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import EngineLoad, QueryLoad, TensorAt
from peerllm.errors import UnavailableError
from peerllm.transport.identity import Identity, load_or_create
from peerllm.types import DeploymentId, DeviceId

VIEW_INTERVAL_S = 0.25  # between two tellings of what changed here
CLOSE_TIMEOUT_S = 8.0  # for letting go of deployments on other devices before this one leaves

log = logging.getLogger(__name__)


class Daemon:
    """Implements facade.Household. `start` once, `close` as often as you like."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._closing = AsyncExitStack()
        self._told: DeviceView | None = None
        self._pulse = Debounce(VIEW_INTERVAL_S, self._beat)
        self._doing = ""  # while this device starts, for people
        self._ready = asyncio.Event()
        self._started = self._closed = False
        self._inherit: Callable[[InheritedAnswer], None] | None = None
        self._relay_door = relay_door.RelayDoor()
        self.household_models = HouseholdModels()

    # ---- life ---------------------------------------------------------------------------------------------------

    async def claim(self) -> None:
        """Take the data directory, so that `status` can be told; BadInputError if it cannot be had. Idempotent."""
        if self._doing:
            return
        data = self.settings.data_dir
        await asyncio.to_thread(data.mkdir, 0o700, True, True)
        self._closing.callback((await asyncio.to_thread(machine.lock, data)).close)
        self.identity: Identity = await asyncio.to_thread(load_or_create, data)
        self._doing = "starting its engine"

    async def _assemble(self, limits: OwnerLimits) -> None:
        """Make all parts, and let the network and the engine report to them."""
        data, me, network, engine = self.settings.data_dir, self.identity.device, self.network, self.device_engine
        self.ledger = Ledger(self.lent_now(limits))
        self.digests = Digests(data / "digests.json")
        peers, most = NetworkPeers(network), self.settings.cache_bytes
        self.store = await asyncio.to_thread(WeightStore, data / "weights", me, peers, most)
        self.offers = Offers(self.store, self.digests)
        self.home = Home(self)
        self.shelf = ModelShelf(data, self.home, lambda: running_names(self.models()), self.poke)
        self.coordinator = Coordinator(self.home, data / "deployments.jsonl")
        self.relays = RelayClient(network.post)
        self.household_events = HouseholdEvents(self)
        self.worker = Worker(
            me,
            self.ledger,
            self.host,
            StageWeights(me, self.store, self.digests, self._own_tensors, token),
            engine.profiler(lambda: self.ledger.free_bytes),
            address=self.home.address,
            report=self.household_events.report,
            changed=self.poke,
        )
        self.successor = Successor(self)
        self.successor.handler = self._inherit
        memory = not engine.configured.memory_bytes  # an accelerator's own is not the machine's
        read = partial(read_machine, memory=memory)
        self.lending = Lending(self, data, limits, self.settings.given_limits, read)
        network.add_route("GET", ROUTE, self.offers.handle)
        network.add_route("POST", relay_door.ROUTE, self._relay_door.handle)
        self.household_events.attach()
        engine.watcher = EngineEvents(self)

    async def started(self) -> None:
        """Returns when `start` is done."""
        await self._ready.wait()

    async def start(self) -> None:
        """Returns when this device can be used; raises why it cannot, with everything closed again."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        await self.claim()
        data = self.settings.data_dir
        limits = await asyncio.to_thread(recalled, data, self.settings.given_limits)
        threads = limits.threads or machine.processors()
        self.network = Network(self.settings, self.identity, self.hello, idle=self._idle)
        engine = self.device_engine = DeviceEngine(self.settings, self.identity, threads, self.network.roster)
        self.host = engine.host
        self._closing.push_async_callback(engine.close)
        self._closing.push_async_callback(self.network.close)
        await engine.start()
        self._doing = "measuring how fast this machine computes"
        await engine.measure()
        await self._assemble(limits)
        self._started = True
        self._closing.push_async_callback(self.shelf.close)
        self._closing.push_async_callback(self._let_go)
        self._closing.push_async_callback(self.lending.close)
        await self.lending.start()
        await self.network.start()
        await self.store.prune()
        await self.shelf.disk.refresh()
        self.household_events.first_look()
        await self.successor.others_heard()
        await self.coordinator.start(lambda deployment: self.successor.models.load(deployment).at_hand)
        self._ready.set()
        self.poke()

    def _own_tensors(self, deployment: DeploymentId) -> dict[str, TensorAt]:
        return self.home.own_tensors(self.coordinator.own_tensors(deployment))

    async def farewell(self, reason: str, within_s: float) -> None:
        """Hold nothing any more: returns when others took over and answers under way are done, or time is up."""
        if self._ready.is_set():
            self.lending.go(reason)
            self.successor.copies.going = True
            if not await self.lending.gone(self.successor.online, lambda: self.coordinator.busy, within_s):
                log.info("%g s are over; what is still held here is let go of", within_s)

    async def sleep(self, within_s: float) -> None:
        """The machine is about to sleep: a farewell, and goodbye to the household until `wake`."""
        await self.farewell("going to sleep", within_s)
        if self._ready.is_set():
            await self.network.say_goodbye("going to sleep")

    def wake(self) -> None:
        """It is awake again."""
        if self._ready.is_set():
            self.lending.go("")
            self.successor.copies.going = False

    async def close(self) -> None:
        """Stop what was started here, say goodbye, end the engine. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._pulse.close()
        await self._closing.aclose()

    async def _let_go(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.successor.close()
                await self.coordinator.close(self.successor.goes_on)
                await self.worker.close()
        except TimeoutError:
            log.warning("letting go of deployments took over %g s; leaving anyway", CLOSE_TIMEOUT_S)

    # ---- facade.Household -----------------------------------------------------------------------------------------

    def status(self) -> HouseholdStatus:
        """The status object (docs/json.md)."""
        if not self._ready.is_set():
            return starting_status(self.identity.device, self.settings, self._doing)
        network, home, me = self.network, self.home, self.identity.device
        peers, addresses = network.peers(), network.addresses
        address = f"{addresses[0]}:{network.port}" if addresses else ""
        planned = link_profiles(home.candidates(), me)
        return status_object(
            own_entry(me, self.settings, self.hello(), self._view(), address=address),
            self.settings,
            {"port": network.port, "problem": network.problem},
            peers=peers.values(),
            links=link_entries(network.link_monitor.figures(), planned, home.name),
            deployments=deployments_of(self.coordinator.views(), peers, home.name, self.coordinator.profiles()),
            sightings=network.sightings(),
        )

    async def engine(self) -> EngineStatus:
        """Asked of the engine itself, so that it is true now; an idle one is not started for it."""
        if self.host.state == IDLE:
            return engine_entry(EngineLoad(0, (), 0, 0, 0))
        return engine_entry(await self.host.ask(QueryLoad(self.host.next_request()), QUERY_TIMEOUT_S))

    def changed(self) -> AsyncIterator[None]:
        return self._pulse.watch()

    def models(self) -> list[ServedModel]:
        if not self._ready.is_set():
            return []
        own = self.coordinator.served()
        here = {model.deployment for model in own if model.state != "stopped"}
        others = self.household_models.others(self.home.name)
        running = [*own, *(model for model in others if model.deployment not in here)]
        peers = self.network.peers().items()
        disks = [(d, peer.view.on_disk) for d, peer in peers if peer.state == "online" and peer.view is not None]
        return [*running, *startable_models(running, [("", self._on_disk()), *disks])]

    def _on_disk(self) -> tuple[DiskModel, ...]:
        """What can be started here; what a person started before, by the name that it had."""
        return with_asleep(self.shelf.listed, {one.model: one.name for one in self.coordinator.asleep})

    def relay(
        self, source: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AbstractAsyncContextManager[RelayedAnswer]:
        return self.relays.ask(source, path, headers, body)

    def answer_peers(self, handler: PeerHandler) -> None:
        self._relay_door.handler = handler

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if self.lending.going:
            raise UnavailableError(f"{self.settings.name} is {self.lending.leaving}")
        chunks = self.coordinator.generate(request)
        return self.successor.copies.copied(request, chunks) if request.kept else chunks

    def inherit_answers(self, handler: Callable[[InheritedAnswer], None]) -> None:
        self._inherit = handler
        if self._started:
            self.successor.handler = handler

    async def run(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> str:
        return await self.coordinator.run(options, progress)

    async def start_model(self, model: str) -> None:
        await self.coordinator.wake(model)

    async def keep(self, deployment: DeploymentId, keep_alive_s: float | None) -> None:
        await self.coordinator.keep(deployment, keep_alive_s)

    async def pull(self, name: str, told: Callable[[int, int], None]) -> None:
        await self.shelf.pull(name, told)

    async def alias(self, name: str, model: str) -> None:
        await self.shelf.alias(name, model)

    async def delete(self, name: str) -> None:
        await self.shelf.delete(name)

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> Preview:
        return await self.coordinator.figures.preview(options, progress)

    async def scenario(self, model: str) -> dict[str, Any]:
        return await self.coordinator.figures.scenario(model)

    async def bench(
        self, model: str, sequences: int, prompt_tokens: int, output_tokens: int, apart: bool = False
    ) -> MeasuredSpeed:
        return await self.coordinator.figures.bench(model, sequences, prompt_tokens, output_tokens, apart)

    async def record(self, model: str) -> int:
        return await self.coordinator.figures.record(model)

    async def recorded(self, model: str, recording: int) -> bytes:
        return await self.coordinator.figures.recorded(model, recording)

    async def stop(self, model: str) -> None:
        await self.coordinator.stop(model)

    async def invite(self) -> tuple[str, int]:
        return await self.network.open_door()

    def hosts(self) -> tuple[str, ...]:
        return self.network.addresses

    async def join(self, code: str, at: tuple[str, int] | None) -> str:
        return await self.network.join(code, at)

    async def leave(self) -> None:
        await self.network.leave()

    async def remove(self, device: str) -> None:
        """By name, id or the start of an id; BadInputError for this device itself."""
        names = {peer.device: {peer.name} for peer in self.network.peers().values()}
        for entry in self.network.roster():
            names.setdefault(entry.device, set()).add(entry.name)
        names.pop(self.identity.device, None)
        await self.network.remove(device_called(device, names, self.identity.device, self.settings.name))

    def limits(self) -> LimitsStatus:
        return cast("LimitsStatus", {**asdict(self.lending.limits), "leaving": self.lending.leaving})

    async def set_limits(self, changes: Mapping[str, Any]) -> LimitsStatus:
        await self.lending.change(changes)
        return self.limits()

    # ---- lending.Lender -------------------------------------------------------------------------------------------

    def lent_now(self, limits: OwnerLimits) -> int:
        return self.device_engine.lent_bytes(limits.memory_bytes)

    def lending_changed(self) -> None:
        self.successor.lends(not self.ledger.leaving)
        self.network.set_hello_changed()
        self.coordinator.stir("what a device lends has changed")
        self.poke()

    async def let_go(self, reason: str) -> None:
        await self.worker.let_go_all(reason)

    async def restart_engine(self, threads: int | None) -> None:
        await self.device_engine.renew(threads or machine.processors())
        self.lending_changed()

    # ---- what this device says of itself -------------------------------------------------------------------------

    def hello(self) -> Hello:
        return self.device_engine.hello(self.ledger.offered_bytes)

    def _view(self) -> DeviceView:
        promised, engine = self.ledger.promised_bytes, self.device_engine
        return DeviceView(
            promised,
            engine.resident_bytes,
            engine.host.state,
            self.coordinator.views(),
            promised + engine.runtime_bytes,
            holdings=self.worker.holdings(),
            leaving=self.ledger.leaving,
            obeyed=self.successor.obeyed,
            on_disk=self._on_disk(),
        )

    def poke(self) -> None:
        """Tell watchers that the status object changed."""
        self._pulse.poke()
        if self._started:
            self.lending.look()

    def _beat(self) -> None:
        """Something changed: tell the others, if it is something that they see."""
        if self._ready.is_set():
            self.successor.look()
        view = self._view()
        told = replace(view, resident_bytes=0)
        if told != self._told:
            self._told = told
            self.network.broadcast(view)

    def _idle(self) -> bool:
        return not any(view.state == "loading" for view in self.coordinator.views()) and not self.coordinator.busy
