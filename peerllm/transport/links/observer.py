"""Who wants to know what becomes of each frame on a link. Times are `perf_counter_ns`'s of this process."""

from __future__ import annotations

from dataclasses import dataclass

from peerllm.transport.frames.frame import Frame, FrameKind
from peerllm.transport.frames.token_run import TokenRun
from peerllm.types import DeploymentId, DeviceId

Destination = tuple[DeploymentId, DeviceId, int]  # the last is the stage


@dataclass(frozen=True, slots=True)
class SentFrame:
    """A frame on its way out, without what it carries: when the link got it, and since when it was bytes and waited."""

    kind: FrameKind
    runs: tuple[TokenRun, ...]
    nbytes: int
    handed_ns: int
    encoded_ns: int


class LinkObserver:
    """Asked whether it is `on` before anything is noted; this one never is. Methods are called on any thread.

    `number` counts the frames one end of a connection sends, from 1, the same at both ends. It never gets what frames
    carry.
    """

    on = False

    def sent(self, to: Destination, number: int, frame: SentFrame, taken_ns: int, written_ns: int) -> None:
        """The link took it from its queue and wrote it into the connection."""

    def received(self, device: DeviceId, frame: Frame, number: int, nbytes: int, came_ns: int, taken_ns: int) -> None:
        """A frame came in, was checked and handed on."""


NO_OBSERVER = LinkObserver()
