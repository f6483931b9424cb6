"""What people see of a deployment's way to serving: a line, a share done, and one for each device that loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peerllm.daemon.control_messages import DeploymentState, Progress
from peerllm.daemon.facade import RunProgress
from peerllm.types import DeviceId

FETCH_SHARE = 0.8  # of a device's progress bar, where weights travel


class ProgressReport:
    """`name` says what a device is called; `changed` is called after each change."""

    def __init__(self, me: DeviceId, name: Callable[[DeviceId], str], changed: Callable[[], None]) -> None:
        self.watchers: list[Callable[[RunProgress], None]] = []
        self.message = ""  # what is being done
        self._share = 0.0  # how much of that, where no device loads
        self._shares: dict[DeviceId, float] = {}
        self._me, self._name, self._changed = me, name, changed

    @property
    def done(self) -> float:
        """How much of a download or of loading is done, 0 to 1."""
        return sum(self._shares.values()) / len(self._shares) if self._shares else self._share

    def say(self, state: DeploymentState, message: str, share: float | None = None) -> None:
        self.message, self._share = message, share or 0.0
        shares = {self._name(device): value for device, value in self._shares.items()}
        if share is not None:
            shares = {self._name(self._me): share}
        for watcher in self.watchers:
            watcher(RunProgress(state, message, shares))
        self._changed()

    def begin(self, devices: Iterable[DeviceId]) -> None:
        """These devices load from now on; none: loading is over."""
        self._shares = dict.fromkeys(devices, 0.0)

    def loaded(self, device: DeviceId, told: Progress) -> None:
        """A device told how far it has fetched or loaded."""
        if device not in self._shares:
            return
        share = min(1.0, told.done_bytes / max(1, told.total_bytes))
        if device != self._me:
            share = share * FETCH_SHARE if told.phase == "fetch" else FETCH_SHARE + share * (1 - FETCH_SHARE)
        self._shares[device] = max(share, self._shares[device])
        self.say("loading", self.message)
