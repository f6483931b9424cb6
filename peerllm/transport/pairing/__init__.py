"""Pairing two devices with a short code spoken from one to the other (docs/wire.md §2)."""

from peerllm.transport.pairing.code import door_name, make_code, normalise
from peerllm.transport.pairing.door import ATTEMPT_TIMEOUT_S, PAIRING_WINDOW_S, TRIES, Paired, PairingDoor
from peerllm.transport.pairing.join import JoinResult, join

__all__ = [
    "ATTEMPT_TIMEOUT_S",
    "PAIRING_WINDOW_S",
    "TRIES",
    "JoinResult",
    "Paired",
    "PairingDoor",
    "door_name",
    "join",
    "make_code",
    "normalise",
]
