"""What the owner of a device chose, checked once at the edge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL_PORT = 8643  # data and pairing follow it
PAIRING_PORT = CONTROL_PORT + 2
API_PORT = 8642


@dataclass(frozen=True, slots=True)
class Settings:
    """Of `peerllm up`. Ports: data and pairing follow `port` (+1, +2); `port` 0 takes any free ones for all three."""

    data_dir: Path
    name: str
    port: int = CONTROL_PORT
    api_host: str = "127.0.0.1"
    api_port: int = API_PORT
    memory_bytes: int | None = None  # None: what the machine has free, less a reserve
    cache_bytes: int | None = None  # the most that cached weights may take on the disk; None: MAX_STORE_BYTES
    threads: int | None = None  # None: the machine's cores
    compute: str = "cpu"  # or an accelerator: "cuda", "cuda:N", "mps"
    peers: tuple[tuple[str, int], ...] = field(default=())  # static peers' control ports
    in_process: bool = False
    hosts: tuple[str, ...] = ("0.0.0.0", "::")  # noqa: S104  control, data and pairing; all need pairing
    mdns: bool = True
    hours: tuple[int, int] | None = None  # None, as below: nothing was said
    battery_percent: int | None = None
    hot_celsius: float | None = None

    @property
    def given_limits(self) -> dict[str, Any]:
        """The owner's limits among the options, by their names in decide/owner_limits.OwnerLimits."""
        names = "memory_bytes", "threads", "hours", "battery_percent", "hot_celsius"
        return {name: getattr(self, name) for name in names}

    @property
    def data_port(self) -> int:
        return self.port + 1 if self.port else 0

    @property
    def pairing_port(self) -> int:
        return self.port + 2 if self.port else 0
