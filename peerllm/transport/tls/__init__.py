"""Mutual TLS 1.3 with pinned certificates: contexts, and a server whose trust can change while it runs."""

from peerllm.transport.tls.contexts import (
    client_context,
    door_context,
    knock_context,
    peer_certificate,
    peer_device,
    server_context,
)
from peerllm.transport.tls.listen import listen
from peerllm.transport.tls.tls_server import TlsServer, request_device

__all__ = [
    "TlsServer",
    "client_context",
    "door_context",
    "knock_context",
    "listen",
    "peer_certificate",
    "peer_device",
    "request_device",
    "server_context",
]
