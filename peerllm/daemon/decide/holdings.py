"""Which shards devices have loaded and promised memory for: as a device keeps it, as its coordinator hears it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peerllm.daemon.control_messages import Holding
from peerllm.daemon.decide.ledger import EpochSum
from peerllm.reused_layers import Layers, reused
from peerllm.types import DeploymentId, DeviceId

Size = tuple[int, int]  # slots, and tokens of context: shards of one size are no use for another


class ShardTable:
    """The shards that one device has loaded for one deployment, and the epochs that use each."""

    def __init__(self, holdings: Iterable[Holding] = ()) -> None:
        self._epochs: dict[tuple[Layers, Size], set[int]] = {
            ((one.first_layer, one.last_layer), (one.slots, one.context)): {one.epoch} for one in holdings
        }

    def load(self, epoch: int, stage: Layers, size: Size) -> None:
        """A stage is loaded: made of shards that were there and of new ones."""
        used, missing = reused(stage, self.of(size))
        for layers in (*used, *missing):
            self._epochs.setdefault((layers, size), set()).add(epoch)

    def end(self, first: int, last: int) -> None:
        """Epochs first..last are over, and with them the shards that no other uses."""
        for shard, epochs in list(self._epochs.items()):
            epochs -= {one for one in epochs if first <= one <= last}
            if not epochs:
                del self._epochs[shard]

    def of(self, size: Size) -> list[Layers]:
        """The shards of that size, by first layer."""
        return sorted(layers for layers, form in self._epochs if form == size)

    def holdings(self, deployment: DeploymentId) -> tuple[Holding, ...]:
        """As it is told to others."""
        told = sorted(self._epochs.items())
        return tuple(Holding(deployment, max(epochs), *layers, *size) for (layers, size), epochs in told)

    @property
    def sizes(self) -> list[Size]:
        return [size for _, size in self._epochs]

    @property
    def epochs(self) -> frozenset[int]:
        return frozenset(epoch for epochs in self._epochs.values() for epoch in epochs)


class HouseholdHoldings:
    """What all devices have loaded and promised for one deployment, as far as its coordinator has heard."""

    def __init__(self) -> None:
        self._shards: dict[DeviceId, ShardTable] = {}
        self._promised: dict[DeviceId, EpochSum] = {}

    @property
    def devices(self) -> set[DeviceId]:
        """Those that may hold something."""
        return self._shards.keys() | self._promised.keys()

    def told(self, device: DeviceId, holdings: Iterable[Holding]) -> None:
        """The device says what it has loaded."""
        table = ShardTable(holdings)
        if table.epochs:
            self._shards[device] = table
        else:
            self._shards.pop(device, None)

    def promise(self, device: DeviceId, epoch: int, nbytes: int, added_bytes: int | None) -> None:
        """The device is asked to promise memory."""
        self._promised.setdefault(device, EpochSum()).add(epoch, nbytes, added_bytes)

    def load(self, device: DeviceId, epoch: int, stage: Layers, size: Size) -> None:
        """The device has loaded a stage."""
        self._shards.setdefault(device, ShardTable()).load(epoch, stage, size)

    def end(self, device: DeviceId, epoch: int, only: bool = False) -> None:
        """The device let go of the epochs up to that one, or of that one alone."""
        first = epoch if only else 0
        if (table := self._shards.get(device)) is not None:
            table.end(first, epoch)
            if not table.epochs:
                del self._shards[device]
        if (promised := self._promised.get(device)) is not None:
            promised.end(first, epoch)
            if not promised:
                del self._promised[device]

    def lost(self, device: DeviceId) -> None:
        """The device's engine died: it holds nothing."""
        self._shards.pop(device, None)
        self._promised.pop(device, None)

    def promised_bytes(self, device: DeviceId) -> int:
        return self._promised[device].nbytes if device in self._promised else 0

    def promised_in(self, device: DeviceId, epoch: int) -> bool:
        """Whether the device promised memory for that epoch, and did not let go of it."""
        return device in self._promised and epoch in self._promised[device]

    def of_before(self, epoch: int) -> set[DeviceId]:
        """The devices that have something of earlier epochs."""
        old = {device for device, table in self._shards.items() if min(table.epochs) < epoch}
        return old | {device for device, promised in self._promised.items() if promised.first < epoch}

    @property
    def size(self) -> Size:
        """That of most shards; (0, 0) where nothing is loaded."""
        sizes = Counter(size for table in self._shards.values() for size in table.sizes)
        return sizes.most_common(1)[0][0] if sizes else (0, 0)

    def shards(self, device: DeviceId, size: Size) -> list[Layers]:
        return self._shards[device].of(size) if device in self._shards else []

    def layers(self, device: DeviceId, size: Size) -> frozenset[int]:
        """All that the device has loaded in that size."""
        return frozenset(i for first, last in self.shards(device, size) for i in range(first, last + 1))
