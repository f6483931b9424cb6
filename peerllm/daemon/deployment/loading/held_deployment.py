"""What one device holds of a deployment: its epochs side by side, and the shards that they share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from peerllm.daemon.control_messages import Assign, Holding
from peerllm.daemon.decide.holdings import ShardTable
from peerllm.types import DeploymentId, DeviceId


@dataclass(slots=True)
class HeldEpoch:
    """One epoch here; `task` loads it, `load` is the engine's part of that."""

    assign: Assign
    task: asyncio.Task[None] | None = None
    load: asyncio.Task[object] | None = None
    loaded: bool = False
    total_bytes: int = 1
    done: dict[int, int] = field(default_factory=dict)  # stage: bytes read
    told: float = 0.0
    over: str = "the deployment was released while it was loading"

    @property
    def number(self) -> int:
        return self.assign.epoch


@dataclass(slots=True)
class HeldDeployment:
    """All epochs here obey one coordinator."""

    deployment: DeploymentId
    coordinator: DeviceId
    epochs: dict[int, HeldEpoch] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one stage at a time, so that each knows its room
    shards: ShardTable = field(default_factory=ShardTable)

    @property
    def last_epoch(self) -> int:
        return max(self.epochs, default=-1)

    def ended(self, epoch: int) -> None:
        """An epoch is over, and with it the shards that no other uses."""
        self.epochs.pop(epoch, None)
        self.shards.end(epoch, epoch)

    def holdings(self) -> tuple[Holding, ...]:
        """What is loaded, by first layer."""
        return self.shards.holdings(self.deployment)
