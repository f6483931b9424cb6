"""The engine's data plane: frames from device to device over pinned websockets, sent while the next is computed."""

from peerllm.transport.links.channels import (
    COLLECTIVE,
    ECHO,
    FRAME_COST_BYTES,
    GRADIENT,
    KEY_VALUE,
    STEP,
    Deliver,
    Delivery,
    Inlet,
)
from peerllm.transport.links.data_plane import DataPlane, OnLost
from peerllm.transport.links.echo import MAX_ECHO_BYTES, FrameTime
from peerllm.transport.links.link import Link
from peerllm.transport.links.observer import LinkObserver, SentFrame
from peerllm.transport.links.poller import SharedPoller

__all__ = [
    "COLLECTIVE",
    "ECHO",
    "FRAME_COST_BYTES",
    "GRADIENT",
    "KEY_VALUE",
    "MAX_ECHO_BYTES",
    "STEP",
    "DataPlane",
    "Deliver",
    "Delivery",
    "FrameTime",
    "Inlet",
    "Link",
    "LinkObserver",
    "OnLost",
    "SentFrame",
    "SharedPoller",
]
