"""One heartbeat as a datagram of 48 bytes that only the two devices of a pair can make: bytes in, bytes out.

The key of a pair comes from a random half of each, told over the control link. Each direction has a key of its own, so
that nobody can send a heartbeat back to where it came from, and its numbers rise, so that an old one says nothing.
"""

from __future__ import annotations

import hmac
import secrets
from struct import Struct

from peerllm.errors import BadInputError
from peerllm.types import DeviceId

MAGIC = b"PLHB"
HALF_BYTES = 32  # of a pair's key, from each device
SENDER_BYTES = 8  # the start of the sender's device id
LABEL = b"peerllm heartbeat 1\0"
_HEAD = Struct(f"<4s4x{SENDER_BYTES}sQ")  # magic, sender, number
_MAC_BYTES = 24
DATAGRAM_BYTES = _HEAD.size + _MAC_BYTES


def new_half() -> str:
    """A random half of a pair's key, as it is told (hexadecimal)."""
    return secrets.token_hex(HALF_BYTES)


def sender_of(datagram: bytes) -> bytes | None:
    """The start of the id of the device that a datagram claims to come from; None if it is no heartbeat."""
    if len(datagram) != DATAGRAM_BYTES or datagram[:8] != MAGIC + bytes(4):
        return None
    return datagram[8 : 8 + SENDER_BYTES]


class HeartbeatPair:
    """What this device sends to one other and accepts from it; BadInputError if the other's half is none."""

    def __init__(self, me: DeviceId, device: DeviceId, my_half: str, their_half: str) -> None:
        if len(their_half) != 2 * HALF_BYTES or not set(their_half) <= set("0123456789abcdef"):
            raise BadInputError(f"{device[:8]} told a heartbeat key that is none")
        self.device = device
        self.halves = my_half, their_half
        self._me = bytes.fromhex(me)[:SENDER_BYTES]
        halves = {me: my_half, device: their_half}
        secret = b"".join(bytes.fromhex(halves[one]) for one in sorted(halves))
        self._send_key = hmac.digest(secret, LABEL + bytes.fromhex(me), "sha256")
        self._receive_key = hmac.digest(secret, LABEL + bytes.fromhex(device), "sha256")
        self._sent = self._received = 0

    def next(self) -> bytes:
        """The next datagram to send."""
        self._sent += 1
        head = _HEAD.pack(MAGIC, self._me, self._sent)
        return head + _mac(self._send_key, head)

    def accepts(self, datagram: bytes) -> bool:
        """Whether the other device made this datagram, after all that were accepted before."""
        head, mac = datagram[: _HEAD.size], datagram[_HEAD.size :]
        number: int = _HEAD.unpack(head)[2]
        if number <= self._received or not hmac.compare_digest(mac, _mac(self._receive_key, head)):
            return False
        self._received = number
        return True


def _mac(key: bytes, head: bytes) -> bytes:
    return hmac.digest(key, head, "sha256")[:_MAC_BYTES]
