"""What the processes of a household hold: memory of their own, threads, open files, and daemons' asyncio tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import aiohttp
import psutil

from tests.household import Device

PATH = "/peerllm/v1/process"


class Watch:
    """Series by (process, what is counted); processes are "NAME daemon" and "NAME engine"."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.series: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._devices = devices
        self._pids: dict[str, int] = {}
        for device in devices:
            assert device.process is not None
            (engine,) = psutil.Process(device.process.pid).children()
            self._pids |= {f"{device.name} daemon": device.process.pid, f"{device.name} engine": engine.pid}

    async def sample(self, session: aiohttp.ClientSession, now: float) -> None:
        """All processes once; an OSError if one of them is gone."""
        for process, pid in self._pids.items():
            for counted, value in held(pid).items():
                self._note(process, counted, now, value)
        for device in self._devices:
            headers = {"Authorization": f"Bearer {device.token()}"}
            async with session.get(device.url + PATH, headers=headers) as response:
                self._note(f"{device.name} daemon", "tasks", now, (await response.json())["tasks"])

    def _note(self, process: str, counted: str, now: float, value: float) -> None:
        self.series.setdefault((process, counted), []).append((now, value))


def held(pid: int) -> Mapping[str, float]:
    """Of one process. Pages of files, which any process may share, are not memory of its own."""
    root = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
    return {
        "memory": float(status["RssAnon"].split()[0]) * 1024,
        "threads": float(status["Threads"]),
        "files": float(sum(1 for _ in (root / "fd").iterdir())),
    }
