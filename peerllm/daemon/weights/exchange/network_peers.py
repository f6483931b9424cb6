"""The household's devices as places to fetch weights from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from peerllm.daemon.control_messages import Answer, Have
from peerllm.daemon.network import Network
from peerllm.types import DeviceId


class NetworkPeers:
    """Implements holders.WeightPeers."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def devices(self) -> Iterable[DeviceId]:
        peers = [peer for peer in self._network.peers().values() if peer.state == "online"]
        return [peer.device for peer in sorted(peers, key=lambda one: -(one.mbps or 0.0))]

    def name(self, device: DeviceId) -> str:
        return self._network.name(device)

    async def ask(self, device: DeviceId, question: Have, timeout_s: float) -> Answer:
        return await self._network.ask(device, question, timeout_s)

    def get(self, device: DeviceId, path: str, offset: int, length: int) -> AsyncIterator[bytes]:
        return self._network.get(device, path, offset, length)
