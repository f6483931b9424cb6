"""What happens in the household goes to the parts of the daemon that act on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from peerllm.daemon.control_messages import (
    Answer,
    AnswerCopied,
    AnswerGrew,
    Computing,
    Control,
    DeviceView,
    Have,
    Inherit,
    MakeWay,
    Progress,
    Question,
    Trouble,
    Vote,
)
from peerllm.daemon.decide.membership_events import LINKED, State
from peerllm.daemon.deployment.coordinator import Coordinator
from peerllm.daemon.deployment.surroundings import Home
from peerllm.daemon.deployment.worker import Worker
from peerllm.daemon.engine_link.device_engine import DeviceEngine
from peerllm.daemon.engine_link.engine_host import AVAILABLE, RUNNING
from peerllm.daemon.network import Network
from peerllm.daemon.relay.relay_client import RelayClient
from peerllm.daemon.status.household_models import HouseholdModels
from peerllm.daemon.successor.successor import Successor
from peerllm.daemon.threads import timed
from peerllm.daemon.weights.offers import Offers
from peerllm.errors import UnavailableError
from peerllm.transport.roster.entry import RosterEntry
from peerllm.types import DeploymentId, DeviceId


class HouseholdEventParts(Protocol):
    """What is needed of the daemon."""

    network: Network
    device_engine: DeviceEngine
    home: Home
    coordinator: Coordinator
    worker: Worker
    successor: Successor
    offers: Offers
    relays: RelayClient
    household_models: HouseholdModels

    def poke(self) -> None: ...


class HouseholdEvents:
    """`attach` it to the network before that starts."""

    def __init__(self, parts: HouseholdEventParts) -> None:
        self._parts = parts
        self._free: dict[DeviceId, int] = {}  # bytes that each candidate can lend
        self._planned: set[DeploymentId] = set()  # what others plan now
        self._renewed: set[DeviceId] = set()  # devices reached anew that have not said yet how they do
        self._timeable: set[DeviceId] = set()  # devices whose engines run, as this one's does

    def attach(self) -> None:
        """Hear of everything from now on."""
        network = self._parts.network
        network.answer_with(self._answer)
        network.link_monitor.echo, network.link_monitor.may_echo = self._echo, self._may_echo
        network.listen(self._heard)
        network.on_change(self.changed)
        network.on_state(self._device_state)
        network.on_roster(self._roster_changed)

    def first_look(self) -> None:
        """How each device of the household is when this one starts."""
        if self._parts.device_engine.host.state in AVAILABLE:
            self._parts.coordinator.device_is(self._parts.home.me, "online")
        self._note_absent()

    def report(self, device: DeviceId, message: Progress | Trouble) -> None:
        """To the coordinator of a deployment, which may be this device's own."""
        if device == self._parts.home.me:
            self._parts.coordinator.hear(device, message)
        else:
            self._parts.network.tell(device, message)

    def changed(self) -> None:
        """Some device of the household, or what it said of itself, changed."""
        parts = self._parts
        free = {device: one.free_bytes for device, one in parts.home.candidates().items()}
        if any(nbytes > self._free.get(device, -1) for device, nbytes in free.items()):
            parts.coordinator.stir("memory was freed")
        self._free = free
        peers = parts.network.peers()
        silent = [device for device, peer in peers.items() if peer.state == "silent"]
        views = {device: peer.view.deployments for device, peer in peers.items() if peer.view}
        parts.household_models.hear(peers, views, silent)
        self._look_ahead()
        parts.coordinator.look_for_others()
        parts.poke()

    def _look_ahead(self) -> None:
        """Others plan a model, or have started their engines: this device's may be needed soon, hops can be timed."""
        parts = self._parts
        planned = {view.deployment for view in parts.home.views() if view.state == "planning"}
        if planned - self._planned:
            parts.device_engine.host.wake()
        self._planned = planned
        timeable = {device for device in parts.network.peers() if self._may_echo(device)}
        if timeable - self._timeable:
            parts.network.link_monitor.engine_changed()
        self._timeable = timeable

    def _note_absent(self) -> None:
        """Devices of the household that have not said anything: models wait a moment for them."""
        for device, peer in self._parts.network.peers().items():
            if peer.view is None:
                self._parts.coordinator.device_is(device, "gone", "is not here")

    # ---- what devices say -----------------------------------------------------------------------------------------

    async def _answer(self, device: DeviceId, question: Question) -> Answer:
        if isinstance(question, Have):
            answer, busy_s = await timed(partial(self._parts.offers.answer, question))
            self._parts.network.kept_busy(device, busy_s)
            return answer
        if isinstance(question, Inherit | Vote):
            return await self._parts.successor.answer(device, question)
        if isinstance(question, MakeWay):
            await self._parts.coordinator.make_way(question.deployment)
            return Answer(0)
        return await self._parts.worker.answer(device, question)

    def _heard(self, device: DeviceId, message: Control) -> None:
        if isinstance(message, Progress | Trouble):
            self._parts.coordinator.hear(device, message)
        elif isinstance(message, DeviceView):
            self._parts.coordinator.told(device, message.holdings)
            self._seen(device, message)
            self._parts.successor.told(device, message.deployments, message.obeyed)
        elif isinstance(message, Computing):
            self._parts.worker.computing(device, message)
        elif isinstance(message, AnswerCopied | AnswerGrew):
            self._parts.successor.hear(device, message)

    def _seen(self, device: DeviceId, view: DeviceView) -> None:
        """A device that is here says how it does."""
        self._parts.worker.back(device)
        renewed = device in self._renewed
        self._renewed.discard(device)
        if view.leaving:
            self._parts.coordinator.device_is(device, "leaving", f"is leaving: {view.leaving}", renewed)
        else:
            self._parts.coordinator.device_is(device, "online", renewed=renewed)

    # ---- who is here ----------------------------------------------------------------------------------------------

    def _device_state(self, device: DeviceId, before: State, state: State, reason: str, renewed: bool) -> None:
        """Membership says how a device is; over a new connection the device itself says then what it has loaded."""
        parts = self._parts
        if renewed:
            self._renewed.add(device)
        match state:
            case "online":
                parts.successor.presence(device, "online", renewed)
                if before == "silent" and not renewed:
                    parts.worker.back(device)
                    parts.coordinator.device_is(device, "online")
            case "silent":
                parts.successor.presence(device, "silent")
                parts.worker.away(device)
                parts.coordinator.device_is(device, "silent", f"is {reason}")
            case "offline" | "left":
                parts.relays.vanished(device)
                if before in LINKED:
                    parts.successor.presence(device, "gone")
                parts.worker.away(device)
                parts.coordinator.device_is(device, "gone", f"is gone ({reason})")
            case "connecting":
                pass

    def _roster_changed(self, entries: tuple[RosterEntry, ...]) -> None:
        self._parts.device_engine.trust(entries)
        self._note_absent()
        self._parts.poke()

    # ---- frames between engines, to time links --------------------------------------------------------------------

    def _may_echo(self, device: DeviceId) -> bool:
        """Whether both engines run: none is started only to time a link."""
        peer = self._parts.network.peers().get(device)
        running = self._parts.device_engine.host.state == RUNNING
        return running and peer is not None and peer.view is not None and peer.view.engine == RUNNING

    async def _echo(self, device: DeviceId, sizes: Sequence[int]) -> Sequence[tuple[int, float]]:
        """Frames of these sizes to another device's engine, timed by this one's. UnavailableError while one is away."""
        hosts, port = self._parts.home.address(device)
        if not hosts or not port or not self._may_echo(device):
            raise UnavailableError(f"the engine of {self._parts.home.name(device)} cannot be reached yet")
        return await self._parts.device_engine.time_link(device, hosts, port, sizes)
