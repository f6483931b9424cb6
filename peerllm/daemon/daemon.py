"""One device's daemon: it owns the network, the engine, what is lent, and the deployments started here."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from peerllm import PROTOCOL_VERSION, __version__
from peerllm.daemon.control_messages import (
    Answer,
    AnswerCopied,
    AnswerGrew,
    Control,
    DeploymentView,
    DeviceView,
    Have,
    Hello,
    Inherit,
    Progress,
    Question,
    Trouble,
    Vote,
)
from peerllm.daemon.debounce import Debounce
from peerllm.daemon.decide.device_profiles import link_profiles
from peerllm.daemon.decide.ledger import Ledger
from peerllm.daemon.decide.membership import LINKED, State
from peerllm.daemon.decide.owner_limits import OwnerLimits
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.loading.epoch_loading import QUERY_TIMEOUT_S
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.engine_link import engine_facts, machine
from peerllm.daemon.engine_link.engine_host import AVAILABLE, IDLE, RUNNING, WAKING, EngineHost
from peerllm.daemon.engine_link.profiler import ComputeSpeed, Profiler, measured
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
from peerllm.daemon.network import Network
from peerllm.daemon.owner.lending import Lending
from peerllm.daemon.owner.limits_file import recalled
from peerllm.daemon.owner.machine_reading import read_machine
from peerllm.daemon.relay import relay_door
from peerllm.daemon.relay.relay_client import RelayClient
from peerllm.daemon.settings import Settings
from peerllm.daemon.status.household_models import HouseholdModels
from peerllm.daemon.status.status import (
    deployments_of,
    device_entry,
    engine_entry,
    link_entries,
    peer_entry,
    sighting_entry,
    starting_status,
)
from peerllm.daemon.successor.successor import Successor
from peerllm.daemon.threads import timed
from peerllm.daemon.weights.digests import Digests
from peerllm.daemon.weights.exchange.holders import ROUTE
from peerllm.daemon.weights.exchange.network_peers import NetworkPeers
from peerllm.daemon.weights.hub import token
from peerllm.daemon.weights.offers import Offers
from peerllm.daemon.weights.stage_weights import StageWeights
from peerllm.daemon.weights.weight_store import WeightStore
from peerllm.engine.messages import (
    Configure,
    Configured,
    EngineLoad,
    FromEngine,
    LinkLost,
    LinkTimed,
    LinkTraffic,
    LoadProgress,
    QueryLoad,
    TimeLink,
    Tokens,
    Trust,
    Trusted,
)
from peerllm.errors import BadInputError, NotFoundError, UnavailableError
from peerllm.transport.identity import Identity, load_or_create
from peerllm.transport.roster.entry import RosterEntry
from peerllm.types import DeploymentId, DeviceId

VIEW_INTERVAL_S = 0.25  # between two tellings of what changed here
ECHO_TIMEOUT_S = 10.0  # dialling another device's engine and timing a few frames
CLOSE_TIMEOUT_S = 8.0  # for letting go of deployments on other devices before this one leaves

log = logging.getLogger(__name__)


def may_need_engines(view: DeploymentView) -> bool:
    """Whether a device without layers of this deployment may need its engine at once.

    An engine takes 100 MB and seconds to start, for which an answer would wait when another device of its plan is lost.
    """
    several = len({stage.device for stage in view.stages}) > 1
    return view.state in ("planning", "loading") or (view.state == "serving" and several)


class Daemon:
    """Implements facade.Household. `start` once, `close` as often as you like."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._threads = 1  # that are lent
        self._closing = AsyncExitStack()
        self._configured: Configured | None = None
        self._compute = ComputeSpeed("", {}, {})
        self._memory_bytes = 0
        self._machine = machine.fingerprint()
        self._told: DeviceView | None = None
        self._free: dict[DeviceId, int] = {}
        self._planned: set[DeploymentId] = set()  # what others plan now
        self._renewed: set[DeviceId] = set()  # devices reached anew that have not said yet how they do
        self._echoing: set[DeviceId] = set()  # devices that hops can be timed to now
        self._tasks: set[asyncio.Task[None]] = set()
        self._pulse = Debounce(VIEW_INTERVAL_S, self._beat)
        self._doing = ""  # while this device starts, for people
        self._ready = asyncio.Event()
        self._started = self._closed = False
        self._inherit: Callable[[InheritedAnswer], None] | None = None
        self._relay_door = relay_door.RelayDoor()
        self._models = HouseholdModels()

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
        self._threads = limits.threads or machine.processors()
        self.network = Network(self.settings, self.identity, self.hello, idle=self._idle)
        self.host = EngineHost(
            self._configure,
            self._heard_engine,
            self._engine_lost,
            self._engine_ready,
            self.settings.in_process,
            self._threads,
            needed=self._engine_needed,
            on_state=self._engine_state,
        )
        self._closing.push_async_callback(self.host.close)
        self._closing.push_async_callback(self.network.close)
        configured = self._configured = await self._engine_started(data / "engine.json")
        self._doing = "measuring how fast this machine computes"
        self._compute = await measured(self.host, configured, self._threads, data / "measured.json")
        self._memory_bytes = configured.memory_bytes or machine.memory_bytes()
        self.ledger = Ledger(self.lent_now(limits))
        self.digests = Digests(data / "digests.json")
        peers = NetworkPeers(self.network)
        me, most = self.identity.device, self.settings.cache_bytes
        self.store = await asyncio.to_thread(WeightStore, data / "weights", me, peers, most)
        self.offers = Offers(self.store, self.digests)
        self.home = Home(self)
        self.coordinator = Coordinator(self.home, data / "deployments.jsonl")
        free, key = (lambda: self.ledger.free_bytes), self._compute.key
        self._profiler = Profiler(self.host, free, key, data / "profiles.json")
        self.worker = Worker(
            self.identity.device,
            self.ledger,
            self.host,
            StageWeights(
                self.identity.device,
                self.store,
                self.digests,
                lambda deployment: self.home.own_tensors(self.coordinator.own_tensors(deployment)),
                token,
            ),
            self._profiler,
            address=self.home.address,
            report=self._report,
            changed=self.poke,
        )
        self.successor = Successor(self)
        self.successor.handler = self._inherit
        memory = not configured.memory_bytes  # an accelerator's own is not the machine's
        read = partial(read_machine, memory=memory)
        self.lending = Lending(self, data, limits, self.settings.given_limits, read)
        network = self.network
        self._relay = RelayClient(network.post)
        network.add_route("GET", ROUTE, self.offers.handle)
        network.add_route("POST", relay_door.ROUTE, self._relay_door.handle)
        network.answer_with(self._answer)
        network.link_monitor.echo, network.link_monitor.may_echo = self._echo, self._may_echo
        network.listen(self._heard)
        network.on_change(self._household_changed)
        network.on_state(self._device_state)
        network.on_roster(self._roster_changed)
        self._started = True
        self._closing.push_async_callback(self._let_go)
        self._closing.push_async_callback(self.lending.close)
        await self.lending.start()
        await network.start()
        await self.store.prune()
        self._first_look()
        await self.successor.others_heard()
        await self.coordinator.start(lambda deployment: self.successor.models.load(deployment).at_hand)
        self._ready.set()
        self.poke()

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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- facade.Household -----------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The status object (docs/json.md)."""
        if not self._ready.is_set():
            return starting_status(self.identity.device, self.settings, self._doing)
        peers, addresses = self.network.peers(), self.network.addresses
        me = {
            **device_entry(self.identity.device, self.hello(), self._view()),
            "name": self.settings.name,
            "state": "online",
            "rtt_ms": 0.0,
            "mbps": None,
            "address": f"{addresses[0]}:{self.network.port}" if addresses else "",
            "problem": "",
        }
        return {
            "device": {"id": self.identity.device, "name": self.settings.name},
            "devices": [me, *(peer_entry(peer) for peer in peers.values())],
            "links": self._links(),
            "deployments": deployments_of(self.coordinator.views(), peers, self.home.name, self.coordinator.profiles()),
            "version": __version__,
            "api": f"{self.settings.api_host}:{self.settings.api_port}",
            "network": {"port": self.network.port, "problem": self.network.problem},
            "nearby": [sighting_entry(sighting) for sighting in self.network.sightings()],
        }

    def _links(self) -> list[dict[str, Any]]:
        planned = link_profiles(self.home.candidates(), self.identity.device)
        return link_entries(self.network.link_monitor.figures(), planned, self.home.name)

    async def engine(self) -> dict[str, Any]:
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
        return [*own, *(model for model in self._models.others(self.home.name) if model.deployment not in here)]

    def relay(
        self, source: DeviceId, path: str, headers: Mapping[str, str], body: bytes
    ) -> AbstractAsyncContextManager[RelayedAnswer]:
        return self._relay.ask(source, path, headers, body)

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

    async def preview(self, options: RunOptions, progress: Callable[[RunProgress], None]) -> dict[str, Any]:
        return await self.coordinator.preview(options, progress)

    async def scenario(self, model: str) -> dict[str, Any]:
        return await self.coordinator.scenario(model)

    async def bench(
        self, model: str, sequences: int, prompt_tokens: int, output_tokens: int, apart: bool = False
    ) -> dict[str, Any]:
        return await self.coordinator.bench(model, sequences, prompt_tokens, output_tokens, apart)

    async def record(self, model: str) -> int:
        return await self.coordinator.record(model)

    async def recorded(self, model: str, recording: int) -> bytes:
        return await self.coordinator.recorded(model, recording)

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
        entries = [entry for entry in self.network.roster() if entry.device != self.identity.device]
        peers = self.network.peers()
        found = {e.device for e in entries if device in (e.device, e.name, peers[e.device].name)}
        found = found or {entry.device for entry in entries if len(device) >= 8 and entry.device.startswith(device)}
        if not found and (
            device == self.settings.name or (len(device) >= 8 and self.identity.device.startswith(device))
        ):
            raise BadInputError(f"{device} is this device; to take it out of its household type: peerllm leave")
        if not found:
            raise NotFoundError(f"no device {device!r} belongs to this household; `peerllm devices` lists them")
        if len(found) > 1:
            raise BadInputError(f"{len(found)} devices are called {device!r}; give the id instead")
        await self.network.remove(found.pop())

    def limits(self) -> dict[str, Any]:
        return {**asdict(self.lending.limits), "leaving": self.lending.leaving}

    async def set_limits(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        await self.lending.change(changes)
        return self.limits()

    # ---- lending.Lender -------------------------------------------------------------------------------------------

    def lent_now(self, limits: OwnerLimits) -> int:
        configured = self._configured
        assert configured is not None
        if configured.memory_bytes:
            return machine.lent_of(limits.memory_bytes, configured.memory_bytes, configured.free_bytes)
        running = self.host.state not in (IDLE, WAKING)
        return machine.lent_bytes(limits.memory_bytes, configured.runtime_bytes, running)

    def lending_changed(self) -> None:
        self.successor.lends(not self.ledger.leaving)
        self.network.set_hello_changed()
        self.coordinator.stir("what a device lends has changed")
        self.poke()

    async def let_go(self, reason: str) -> None:
        await self.worker.let_go_all(reason)

    async def restart_engine(self, threads: int | None) -> None:
        self._threads = threads or machine.processors()
        self.host.renew(self._threads)
        assert self._configured is not None
        measured_in = self.settings.data_dir / "measured.json"
        self._compute = await measured(self.host, self._configured, self._threads, measured_in)
        self._profiler.computed_by(self._compute.key)
        self.lending_changed()

    # ---- what this device says of itself -------------------------------------------------------------------------

    def hello(self) -> Hello:
        configured = self._configured
        if configured is None:
            raise UnavailableError("the engine has not started yet")
        return Hello(
            protocol=PROTOCOL_VERSION,
            version=__version__,
            libraries=configured.versions,
            name=self.settings.name,
            control_port=self.settings.port,
            data_port=configured.port,
            memory_bytes=self._memory_bytes,
            lent_bytes=self.ledger.offered_bytes,
            gbytes_per_s=self._compute.gbytes_per_s,
            gflops=self._compute.gflops,
            architectures=configured.architectures,
            dtypes=configured.dtypes,
            machine=self._machine,
            place=configured.place,
            threads=self._threads,
            processors=os.cpu_count() or 1,
        )

    def _view(self) -> DeviceView:
        promised, state = self.ledger.promised_bytes, self.host.state
        own = self._configured.runtime_bytes if self._configured is not None and state == RUNNING else 0
        return DeviceView(
            promised,
            self._resident_bytes(),
            state,
            self.coordinator.views(),
            promised + own,
            holdings=self.worker.holdings(),
            leaving=self.ledger.leaving,
        )

    def _resident_bytes(self) -> int:
        if self.host.pid is None and not self.settings.in_process:
            return 0
        try:
            return int(psutil.Process(self.host.pid).memory_info().rss)
        except psutil.Error:
            return 0

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

    # ---- the engine -----------------------------------------------------------------------------------------------

    def _configure(self, request: int) -> Configure:
        return Configure(
            request=request,
            device=self.identity.device,
            certificate_path=str(self.identity.certificate_path),
            key_path=str(self.identity.key_path),
            hosts=self.settings.hosts,
            port=self._configured.port if self._configured is not None else self.settings.data_port,
            threads=self._threads,
            trusted=self._trusted(self.network.roster()),
            compute=self.settings.compute,
        )

    async def _engine_started(self, file: Path) -> Configured:
        """Starts the engine to learn what it can do, unless that is known: then it stays idle until it is needed.

        With ports free to choose, only a running engine knows its own.
        """
        if self.settings.port and self.settings.compute == "cpu" and not self.settings.in_process:
            known = await asyncio.to_thread(engine_facts.recall, file, self._threads)
            if known is not None:
                self.host.start_idle()
                return replace(known, port=self.settings.data_port)
        return await self.host.start()

    def _engine_needed(self) -> bool:
        """Whether layers are held here, or may soon be."""
        if not self._started or self.ledger.promises():
            return True
        views = (*self.coordinator.views(), *self.home.views())
        return any(may_need_engines(view) for view in views)

    def _trusted(self, entries: tuple[RosterEntry, ...]) -> tuple[Trusted, ...]:
        me = self.identity.device
        return tuple(Trusted(entry.device, entry.certificate_pem) for entry in entries if entry.device != me)

    def _heard_engine(self, event: FromEngine) -> None:
        match event:
            case Tokens():
                self.coordinator.tokens(event)
            case LoadProgress():
                self.worker.progress(event)
            case LinkLost():
                self.worker.link_lost(event)
            case LinkTraffic(frames, handover_s):
                for frame in frames:
                    self.network.link_monitor.framed(*frame)
                self.network.link_monitor.handover(handover_s)

    def _may_echo(self, device: DeviceId) -> bool:
        """Whether both engines run: none is started only to time a link."""
        peer = self.network.peers().get(device)
        return peer is not None and peer.view is not None and peer.view.engine == self.host.state == RUNNING

    async def _echo(self, device: DeviceId, sizes: Sequence[int]) -> Sequence[tuple[int, float]]:
        """Frames of these sizes to another device's engine, timed by this one's. UnavailableError while one is away."""
        hosts, port = self.home.address(device)
        if not hosts or not port or not self._may_echo(device):
            raise UnavailableError(f"the engine of {self.home.name(device)} cannot be reached yet")
        asked = TimeLink(self.host.next_request(), device, hosts, port, tuple(sizes))
        timed: LinkTimed = await self.host.ask(asked, ECHO_TIMEOUT_S)
        return timed.frames

    def _engine_lost(self, reason: str) -> None:
        if self._started:
            self.worker.engine_lost(reason)
            self.coordinator.device_is(self.identity.device, "gone", f"lost its engine ({reason})")
            self.poke()

    def _engine_state(self, state: str) -> None:
        if self._started:
            self.poke()

    def _engine_ready(self, configured: Configured) -> None:
        self._configured = configured
        file = self.settings.data_dir / "engine.json"
        self._spawn(asyncio.to_thread(engine_facts.save, file, self._threads, configured), "save engine facts")
        if self._started:
            self.network.set_hello_changed()
            self.network.link_monitor.engine_changed()
            self.coordinator.device_is(self.identity.device, "online")
            self.poke()

    # ---- the household ----------------------------------------------------------------------------------------------

    async def _answer(self, device: DeviceId, question: Question) -> Answer:
        if isinstance(question, Have):
            answer, busy_s = await timed(partial(self.offers.answer, question))
            self.network.kept_busy(device, busy_s)
            return answer
        if isinstance(question, Inherit | Vote):
            return await self.successor.answer(device, question)
        return await self.worker.answer(device, question)

    def _heard(self, device: DeviceId, message: Control) -> None:
        if isinstance(message, Progress | Trouble):
            self.coordinator.hear(device, message)
        elif isinstance(message, DeviceView):
            self.coordinator.told(device, message.holdings)
            self._seen(device, message)
            self.successor.told(device, message.deployments)
        elif isinstance(message, AnswerCopied | AnswerGrew):
            self.successor.hear(device, message)

    def _first_look(self) -> None:
        """How each device of the household is when this one starts."""
        if self.host.state in AVAILABLE:
            self.coordinator.device_is(self.identity.device, "online")
        self._note_absent()

    def _note_absent(self) -> None:
        """Devices of the household that have not said anything: models wait a moment for them."""
        for device, peer in self.network.peers().items():
            if peer.view is None:
                self.coordinator.device_is(device, "gone", "is not here")

    def _seen(self, device: DeviceId, view: DeviceView) -> None:
        """A device that is here says how it does."""
        self.worker.back(device)
        renewed = device in self._renewed
        self._renewed.discard(device)
        if view.leaving:
            self.coordinator.device_is(device, "leaving", f"is leaving: {view.leaving}", renewed)
        else:
            self.coordinator.device_is(device, "online", renewed=renewed)

    def _report(self, device: DeviceId, message: Progress | Trouble) -> None:
        """To the coordinator of a deployment, which may be this device's own."""
        if device == self.identity.device:
            self.coordinator.hear(device, message)
        else:
            self.network.tell(device, message)

    def _household_changed(self) -> None:
        free = {device: one.free_bytes for device, one in self.home.candidates().items()}
        if any(nbytes > self._free.get(device, -1) for device, nbytes in free.items()):
            self.coordinator.stir("memory was freed")
        self._free = free
        peers = self.network.peers()
        silent = [device for device, peer in peers.items() if peer.state == "silent"]
        self._models.hear(peers, {device: peer.view.deployments for device, peer in peers.items() if peer.view}, silent)
        self._look_ahead()
        self.poke()

    def _look_ahead(self) -> None:
        """Others plan a model, or have started their engines: this device's may be needed soon, hops can be timed."""
        planned = {view.deployment for view in self.home.views() if view.state == "planning"}
        if planned - self._planned:
            self.host.wake()
        self._planned = planned
        echoing = {device for device in self.network.peers() if self._may_echo(device)}
        if echoing - self._echoing:
            self.network.link_monitor.engine_changed()
        self._echoing = echoing

    def _device_state(self, device: DeviceId, before: State, state: State, reason: str, renewed: bool) -> None:
        """Membership says how a device is; over a new connection the device itself says then what it has loaded."""
        if renewed:
            self._renewed.add(device)
        match state:
            case "online":
                self.successor.presence(device, "online")
                if before == "silent" and not renewed:
                    self.worker.back(device)
                    self.coordinator.device_is(device, "online")
            case "silent":
                self.successor.presence(device, "silent")
                self.worker.away(device)
                self.coordinator.device_is(device, "silent", f"is {reason}")
            case "offline" | "left":
                self._relay.vanished(device)
                if before in LINKED:
                    self.successor.presence(device, "gone")
                self.worker.away(device)
                self.coordinator.device_is(device, "gone", f"is gone ({reason})")
            case "connecting":
                pass

    def _roster_changed(self, entries: tuple[RosterEntry, ...]) -> None:
        self.host.tell(Trust(self._trusted(entries)))
        self._note_absent()
        self.poke()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s failed", task.get_name(), exc_info=task.exception())
