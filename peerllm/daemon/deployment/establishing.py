"""One epoch of a deployment on its way: reserved, assigned and linked on every device of its plan, or let go of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peerllm.daemon.control_messages import Answer
from peerllm.daemon.decide.assignments import assignments, travelling
from peerllm.daemon.decide.demand import Blueprint, added_bytes
from peerllm.daemon.decide.holdings import HouseholdHoldings, Size
from peerllm.daemon.deployment.negotiation import (
    DeviceFailedError,
    Surroundings,
    activate_all,
    assign_all,
    release,
    reserve,
)
from peerllm.engine.messages import Inspected
from peerllm.errors import PeerLLMError, RefusedError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeploymentId, DeviceId, Stage


class DeviceRefusedError(RefusedError):
    """A device does not promise the memory; it says how much it could lend.

    `away`: it cannot be asked. `past`: it has a later epoch of the deployment, which another coordinator began.
    """

    def __init__(
        self, message: str, device: DeviceId, wanted_bytes: int, free_bytes: int, away: bool, past: bool = False
    ) -> None:
        super().__init__(message)
        self.device, self.away, self.past = device, away, past
        self.wanted_bytes, self.free_bytes = wanted_bytes, free_bytes


@dataclass(frozen=True, slots=True)
class Epoch:
    """A plan of a deployment that stands or is to stand."""

    number: int
    blueprint: Blueprint

    @property
    def size(self) -> Size:
        return self.blueprint.workload.sequences, self.blueprint.workload.context

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        return self.blueprint.plan.devices

    def layers(self, device: DeviceId) -> frozenset[int]:
        """The layers that the device computes in this epoch."""
        mine = (stage for stage in self.blueprint.plan.stages if stage.device == device)
        return frozenset(layer for one in mine for layer in range(one.first_layer, one.last_layer + 1))


class EpochNegotiation:
    """One deployment's talk with the devices of its plans; `holdings` is kept up to date with what they answer.

    `say` tells people what is done and how much of it, `reserved` is called when the devices begin to load an epoch,
    `loaded` with the most bytes that one of them had to load, and the seconds that all took.
    """

    def __init__(
        self,
        around: Surroundings,
        deployment: DeploymentId,
        holdings: HouseholdHoldings,
        say: Callable[[str, float | None], None],
        reserved: Callable[[Epoch], None],
        loaded: Callable[[int, float], None],
    ) -> None:
        self._around, self._deployment = around, deployment
        self.holdings, self._say, self._reserved, self._loaded = holdings, say, reserved, loaded
        self._ending: dict[DeviceId, set[asyncio.Task[object]]] = {}  # releases that devices have not answered yet

    async def establish(
        self, epoch: Epoch, inspected: Inspected, make_room: bool, before: Sequence[Stage] = ()
    ) -> None:
        """Load and link an epoch beside those that stand; raises DeviceRefusedError or DeviceFailedError.

        `before`: the stages in which sequences run now. `make_room`: where a device has no room beside earlier epochs,
        those are let go of there first.
        """
        around, blueprint = self._around, epoch.blueprint
        moving = travelling(blueprint, inspected, around.me)
        begun, total = time.monotonic(), sum(tensor.nbytes for tensor in moving)

        def hashing(share: float) -> None:
            rate = human_bytes(round(share * total / max(1e-3, time.monotonic() - begun)))
            self._say(f"hashing the weights that will travel: {share:.0%}, {rate} a second", share)

        hashes = await around.hashes(moving, hashing)
        await self._reserve_all(epoch, make_room)
        self._reserved(epoch)
        hub = await around.hub_places(tensor for layer in inspected.tensors for tensor in layer)
        work = assignments(
            self._deployment, epoch.number, blueprint, inspected, hashes=hashes, address=around.address, hub=hub,
            before=before,
        )  # fmt: skip
        fresh = max(self._added_bytes(epoch, device) for device in epoch.devices)
        began = time.monotonic()
        await assign_all(around, work)
        self._loaded(fresh, time.monotonic() - began)
        for stage in blueprint.plan.stages:
            self.holdings.load(stage.device, epoch.number, (stage.first_layer, stage.last_layer), epoch.size)
        self._say("connecting", None)
        await activate_all(around, self._deployment, epoch.number, epoch.devices)

    async def let_go(self, number: int, devices: Iterable[DeviceId], only: bool = False) -> None:
        """Release all epochs up to that one, or that one alone; whoever cannot be reached does so by itself later."""
        await asyncio.gather(*(self._end(device, number, only) for device in list(devices)))

    async def _end(self, device: DeviceId, number: int, only: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        ending = self._ending.setdefault(device, set())
        ending.add(task)
        try:
            if await release(self._around, device, self._deployment, number, only):
                self.holdings.end(device, number, only)
        finally:
            ending.discard(task)

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _reserve_all(self, epoch: Epoch, make_room: bool) -> None:
        """Reserve on every device, in the one order that all coordinators use: the first of two rivals wins all."""
        for device in sorted(epoch.blueprint.promises):
            answer = await self._reserve(epoch, device)
            if answer.error == "RefusedError" and make_room and device in self.holdings.of_before(epoch.number):
                await self.let_go(epoch.number - 1, (device,))
                answer = await self._reserve(epoch, device)
            if answer.error:
                reason = f"{self._around.name(device)} cannot take part: {answer.reason}"
                wanted, away = self._added_bytes(epoch, device), answer.error == "LinkError"
                past = answer.error == "PastEpochError"
                raise DeviceRefusedError(reason, device, wanted, answer.free_bytes, away, past)

    def _added_bytes(self, epoch: Epoch, device: DeviceId) -> int:
        """What the epoch needs on the device beyond what is loaded there."""
        shards = self.holdings.shards(device, epoch.size)
        return min(epoch.blueprint.promises[device], added_bytes(epoch.blueprint, device, shards))

    async def _reserve(self, epoch: Epoch, device: DeviceId) -> Answer:
        if ending := self._ending.get(device):
            await asyncio.wait(ending)
        nbytes = epoch.blueprint.promises[device]
        added = self._added_bytes(epoch, device)
        answer = await reserve(self._around, device, self._deployment, epoch.number, nbytes, added)
        if not answer.error:
            self.holdings.promise(device, epoch.number, nbytes, added)
        return answer


def failure_of(error: PeerLLMError) -> tuple[DeviceId | None, PeerLLMError]:
    """The device that kept an epoch from being established, None if it was none, and the error that says why."""
    if isinstance(error, DeviceFailedError):
        return error.device, error.error
    if isinstance(error, DeviceRefusedError):
        return error.device, error
    return None, error
