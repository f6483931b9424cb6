"""A coordinator's talk with the devices of a plan: reserve, assign, activate, carry, release. Errors name it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from peerllm.daemon.control_messages import (
    Activate,
    Answer,
    Assign,
    Carry,
    Computing,
    DeploymentView,
    LoadQuestion,
    Release,
    Reserve,
)
from peerllm.daemon.decide.assignments import Address
from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.daemon.decide.hub_places import HubPlaces
from peerllm.daemon.deployment.model_files import ModelOnDisk, Tell
from peerllm.daemon.threads import Progress
from peerllm.engine.messages import Cancel, Inspected, Submit, TensorAt
from peerllm.errors import LinkError, PeerLLMError, error_class
from peerllm.types import DeploymentId, DeviceId

LEASE_S = 30.0  # from the first reservation to the last assignment
RESERVE_TIMEOUT_S = 5.0
ASSIGN_TIMEOUT_S = 6 * 3600.0  # a large model over a slow link; a device that vanishes ends it at once
ACTIVATE_TIMEOUT_S = 30.0
CARRY_TIMEOUT_S = 75.0
RELEASE_TIMEOUT_S = 75.0  # a stage in the middle of loading is first brought to an end


log = logging.getLogger(__name__)


class Surroundings(Protocol):
    """All that a coordinator reaches of the device it runs on and of the household."""

    @property
    def me(self) -> DeviceId: ...

    def name(self, device: DeviceId) -> str: ...

    def candidates(self) -> dict[DeviceId, Candidate]:
        """The devices that could take part now, this one among them."""
        ...

    def absent(self) -> list[str]:
        """Names of the household's devices that could not take part now."""
        ...

    def address(self, device: DeviceId) -> Address:
        """Where another device's data plane is reached from here."""
        ...

    async def ask(self, device: DeviceId, question: LoadQuestion, timeout_s: float) -> Answer:
        """LinkError if the device cannot be asked or does not answer in time."""
        ...

    async def make_way(self, device: DeviceId, deployment: DeploymentId) -> None:
        """Have a device unload what it coordinates and nobody uses; PeerLLMError if it does not."""
        ...

    def looked_up(self, model: str, tell: Tell) -> AbstractAsyncContextManager[ModelOnDisk]:
        """What is needed to inspect a model, for as long as the block runs; its weights are not downloaded for that."""
        ...

    async def resolve(self, model: str, progress: Progress, total_bytes: int) -> Path:
        """The model's directory, downloaded first where it is not here; `total_bytes`: what is missing, 0: unknown."""
        ...

    async def inspect(self, model_dir: Path, dtype: str, quantize: str) -> Inspected: ...

    async def hashes(self, tensors: Iterable[TensorAt], progress: Progress) -> dict[str, str]:
        """SHA-256 by tensor name; "" for one on the hub that nobody has fetched yet."""
        ...

    async def hub_places(self, tensors: Iterable[TensorAt]) -> HubPlaces | None:
        """Where the hub has the tensors, if each device may fetch its own from there."""
        ...

    def tell_engine(self, message: Submit | Cancel) -> None: ...

    def tell_device(self, device: DeviceId, message: Computing) -> None:
        """Another device, which misses it if it is away."""
        ...

    def switch(self, deployment: DeploymentId, epoch: int) -> Awaitable[None]:
        """Tell this device's engine at once that sequences run in that epoch from now on; done when all do."""
        ...

    def views(self) -> Iterable[DeploymentView]:
        """The deployments that other devices coordinate."""
        ...

    def changed(self) -> None:
        """Tell watchers that the status object changed."""
        ...


def unless_error(answer: Answer, name: str) -> None:
    """Raise what the device's answer says, as the error class it names."""
    if answer.error:
        raise error_class(answer.error)(f"{name}: {answer.reason}")


class DeviceFailedError(PeerLLMError):
    """A device could not do its part of a plan; `error` says why and names it."""

    def __init__(self, device: DeviceId, error: PeerLLMError) -> None:
        super().__init__(str(error))
        self.device, self.error = device, error


async def reserve(
    around: Surroundings, device: DeviceId, deployment: DeploymentId, epoch: int, nbytes: int, added_bytes: int
) -> Answer:
    """The device's answer; one of error "LinkError" if it could not be asked."""
    question = Reserve(deployment, epoch, nbytes, LEASE_S, added_bytes)
    try:
        return await around.ask(device, question, RESERVE_TIMEOUT_S)
    except LinkError as error:
        return Answer(0, "LinkError", str(error))


async def assign_all(around: Surroundings, assigns: Mapping[DeviceId, Assign]) -> None:
    """Every device loads at the same time; the first failure ends the wait for the others. DeviceFailedError."""

    async def one(device: DeviceId, assign: Assign) -> None:
        await _done(around, device, assign, ASSIGN_TIMEOUT_S)

    try:
        async with asyncio.TaskGroup() as group:
            for device, assign in assigns.items():
                group.create_task(one(device, assign), name=f"assign {around.name(device)}")
    except* PeerLLMError as failures:
        raise _first(failures) from None


async def activate_all(around: Surroundings, deployment: DeploymentId, epoch: int, devices: Iterable[DeviceId]) -> None:
    """Downstream first, so that every link is dialled to a stage that is ready. DeviceFailedError."""
    for device in reversed(list(devices)):
        await _done(around, device, Activate(deployment, epoch), ACTIVATE_TIMEOUT_S)


async def release(around: Surroundings, device: DeviceId, deployment: DeploymentId, epoch: int, only: bool) -> bool:
    """Release all epochs up to that one, or that one alone. Whether the device could be reached, and did it."""
    try:
        answer = await around.ask(device, Release(deployment, epoch, only), RELEASE_TIMEOUT_S)
    except PeerLLMError:
        return False
    return not answer.error


async def carry_all(around: Surroundings, carried: Iterable[tuple[DeviceId, Carry]]) -> None:
    """Have each device copy what it keeps of running sequences; what fails is computed again, and is no error."""

    async def one(device: DeviceId, question: Carry) -> None:
        try:
            unless_error(await around.ask(device, question, CARRY_TIMEOUT_S), around.name(device))
        except PeerLLMError as error:
            log.info("%s is computed again: %s", f"layers {question.first_layer}..{question.last_layer}", error)

    await asyncio.gather(*(one(device, question) for device, question in carried))


async def _done(around: Surroundings, device: DeviceId, question: LoadQuestion, timeout_s: float) -> None:
    try:
        unless_error(await around.ask(device, question, timeout_s), around.name(device))
    except PeerLLMError as error:
        raise DeviceFailedError(device, error) from error


def _first(group: BaseExceptionGroup[PeerLLMError]) -> PeerLLMError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PeerLLMError)
    return error
