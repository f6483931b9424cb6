"""Who has which tensors: what this device answers, and what it asks the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from peerllm.daemon.control_messages import Answer, Have
from peerllm.daemon.decide.hub_places import SHA256
from peerllm.errors import BadInputError, PeerLLMError
from peerllm.types import DeviceId

MAX_KEYS = 1024  # of one question
HAVE_TIMEOUT_S = 10.0
ROUTE = "/weights/{sha256}"  # at the control port

log = logging.getLogger(__name__)


class WeightPeers(Protocol):
    """The other devices, as far as weights go."""

    def devices(self) -> Iterable[DeviceId]:
        """Those that are online, the fastest first."""
        ...

    def name(self, device: DeviceId) -> str: ...

    async def ask(self, device: DeviceId, question: Have, timeout_s: float) -> Answer: ...

    def get(self, device: DeviceId, path: str, offset: int, length: int) -> AsyncIterator[bytes]: ...


class TensorStock(Protocol):
    """What this device has."""

    def held(self, key: str) -> str:
        """The SHA-256 of the tensor if it can be fetched from here, else ""."""
        ...

    def coming(self, key: str) -> bool:
        """Whether it is being fetched now."""
        ...


def answer(stock: TensorStock, question: Have) -> Answer:
    """What a household's device is told of this one's tensors."""
    if len(question.keys) > MAX_KEYS or not all(map(SHA256.fullmatch, question.keys)):
        raise BadInputError(f"a question names 1 to {MAX_KEYS} tensors by SHA-256")
    held = tuple(map(stock.held, question.keys))
    coming = tuple(n for n, key in enumerate(question.keys) if not held[n] and stock.coming(key))
    return Answer(0, held=held, coming=coming)


@dataclass(slots=True)
class HolderTable:
    """What the others said: by key the devices that have the tensor with its SHA-256; by device what it fetches now."""

    held: dict[str, dict[DeviceId, str]] = field(default_factory=dict)
    coming: dict[DeviceId, set[str]] = field(default_factory=dict)


async def look(household: WeightPeers, keys: Sequence[str]) -> HolderTable:
    """Ask every device which of the tensors it has; one that does not answer has none."""
    found = HolderTable()

    async def one(device: DeviceId) -> None:
        for start in range(0, len(keys), MAX_KEYS):
            asked = keys[start : start + MAX_KEYS]
            try:
                told = await household.ask(device, Have(tuple(asked)), HAVE_TIMEOUT_S)
            except PeerLLMError as error:
                log.debug("%s does not say which weights it has: %s", household.name(device), error)
                return
            if len(told.held) != len(asked) or not all(one == "" or SHA256.fullmatch(one) for one in told.held):
                log.warning("%s answers nonsense about its weights", household.name(device))
                return
            for key, sha256 in zip(asked, told.held, strict=True):
                if sha256:
                    found.held.setdefault(key, {})[device] = sha256
            coming = {asked[n] for n in told.coming if 0 <= n < len(asked)}
            found.coming.setdefault(device, set()).update(coming)

    await asyncio.gather(*(one(device) for device in household.devices()))
    return found
