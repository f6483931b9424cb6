"""The engine's data plane: frames from device to device over pinned websockets, sent while the next is computed."""

from peerllm.transport.links.echo import MAX_ECHO_BYTES, Timed
from peerllm.transport.links.lead import Lead
from peerllm.transport.links.link import Link
from peerllm.transport.links.outbox import SEND_QUEUE_BYTES, SEND_QUEUE_FRAMES, SEND_TIMEOUT_S, Outbox
from peerllm.transport.links.plane import DataPlane, OnLost
from peerllm.transport.links.receiver import Deliver, Ingress
from peerllm.transport.links.watch import Parting, Watch

__all__ = [
    "MAX_ECHO_BYTES",
    "SEND_QUEUE_BYTES",
    "SEND_QUEUE_FRAMES",
    "SEND_TIMEOUT_S",
    "DataPlane",
    "Deliver",
    "Ingress",
    "Lead",
    "Link",
    "OnLost",
    "Outbox",
    "Parting",
    "Timed",
    "Watch",
]
