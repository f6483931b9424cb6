"""SPAKE2 over the code, bound to both certificates: what both sides must agree on, and the keys that follow."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2 import SPAKE2_A, SPAKE2_B

from peerllm.errors import PairingError
from peerllm.types import DeviceId

DOMAIN = b"peerllm pairing 1\0"
SHARE_BYTES = 33  # side, then a point of the Ed25519 group
KEY_BYTES = 32
LENGTH = Struct("<I")


@dataclass(frozen=True, slots=True)
class Keys:
    """What follows from the shared secret; equal on both sides only if code, certificates and words were."""

    transcript: bytes  # what each side signs
    joiner_proof: str
    inviter_proof: str
    joiner_mac: bytes
    inviter_mac: bytes


class Pake:
    """One side of one attempt."""

    def __init__(self, code: str, inviter: DeviceId, joiner: DeviceId, inviting: bool) -> None:
        side = SPAKE2_A if inviting else SPAKE2_B
        self._binding = (bytes.fromhex(inviter), bytes.fromhex(joiner))
        self._spake = side(code.encode(), idA=self._binding[0], idB=self._binding[1])
        self.share: str = self._spake.start().hex()  # some ms of arithmetic: not on the loop

    def finish(self, share: str, hello: bytes, challenge: bytes) -> Keys:
        """The keys, given the other's share and both first messages as sent. PairingError for an impossible share."""
        try:
            inbound = bytes.fromhex(share)
            if len(inbound) != SHARE_BYTES:
                raise ValueError(f"{len(inbound)} bytes")
            secret = self._spake.finish(inbound)
        except Exception as error:  # spake2 has no one family: SPAKEError, ValueError, AssertionError, ...
            raise PairingError("the other side's share is impossible") from error
        parts = (*self._binding, hello, challenge)
        transcript = sha256(DOMAIN + b"".join(LENGTH.pack(len(part)) + part for part in parts)).digest()
        stream = HKDF(SHA256(), 4 * KEY_BYTES, salt=transcript, info=DOMAIN).derive(secret)
        joiner_key, inviter_key, joiner_mac, inviter_mac = (
            stream[start : start + KEY_BYTES] for start in range(0, len(stream), KEY_BYTES)
        )
        return Keys(
            transcript,
            hmac.digest(joiner_key, transcript, sha256).hex(),
            hmac.digest(inviter_key, transcript, sha256).hex(),
            joiner_mac,
            inviter_mac,
        )
