"""Who wants to know what becomes of each frame on a link. Times are `perf_counter_ns`'s of this process."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.transport.frames import Frame, FrameKind, TokenRun
from peerllm.types import DeploymentId, DeviceId


@dataclass(frozen=True, slots=True)
class Parting:
    """A frame on its way out, without what it carries. `handed`: to the link; `encoded`: bytes, before the queue."""

    kind: FrameKind
    runs: tuple[TokenRun, ...]
    nbytes: int
    handed_ns: int
    encoded_ns: int


class Watch:
    """Asked whether it is `on` before anything is noted; this one never is. Methods are called on any thread.

    `number` counts a connection's frames from 1, the same at both ends. Nothing of what frames carry is handed over.
    """

    on = False

    def queued(self, deployment: DeploymentId, device: DeviceId, stage: int, parting: Parting, now_ns: int) -> None:
        """The frame waits in the link's queue since `now_ns`: by whoever sent it, who may have waited for room."""

    def sent(
        self,
        deployment: DeploymentId,
        device: DeviceId,
        stage: int,
        number: int,
        parting: Parting,
        taken_ns: int,
        written_ns: int,
    ) -> None:
        """The link took it from its queue and wrote it into the connection."""

    def received(self, device: DeviceId, frame: Frame, number: int, nbytes: int, came_ns: int, taken_ns: int) -> None:
        """A frame came in, was checked and handed on."""

    def held(self, deployment: DeploymentId, device: DeviceId, stage: int, since_ns: int, until_ns: int) -> None:
        """Nothing was read from the connection meanwhile, since too much waits here."""


NOBODY_WATCHES = Watch()
