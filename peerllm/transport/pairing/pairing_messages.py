"""What the two sides of a pairing say, and how it is framed: length, then JSON, after the code is proven with a MAC."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct
from typing import TypeVar

from peerllm import codec
from peerllm.errors import LinkError, PairingError
from peerllm.transport.roster.entry import RosterEntry

PAIRING_VERSION = 2
MAX_UNPROVEN_BYTES = 64 << 10  # of a message from who has not shown yet that the code is known there
MAC_BYTES = 32
LENGTH = Struct("<I")
SEQUENCE = Struct("<Q")

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """Joiner: who I am, my share of the PAKE, the highest roster counter I know."""

    version: int
    certificate_pem: str
    name: str
    share: str  # hex
    counter: int


@dataclass(frozen=True, slots=True)
class Challenge:
    """Inviter: my share."""

    version: int
    share: str  # hex


@dataclass(frozen=True, slots=True)
class Confirm:
    """I know the code. The joiner says it first; the inviter's answer spends one of the tries."""

    proof: str  # hex


@dataclass(frozen=True, slots=True)
class PairingRefused:
    """Inviter: no, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Possession:
    """Joiner: the key of my certificate is mine (signature over the transcript, hex)."""

    signature: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """Inviter: who I am, with the same proof, and the household, the newcomer among it."""

    name: str
    signature: str  # hex
    entries: tuple[RosterEntry, ...]


@dataclass(frozen=True, slots=True)
class Introduction:
    """Joiner: I take the inviter in, too."""

    entry: RosterEntry


@dataclass(frozen=True, slots=True)
class PairingDone:
    """Inviter: it is written down."""

    device: str


Message = JoinRequest | Challenge | Confirm | PairingRefused | Possession | Welcome | Introduction | PairingDone


class PairingChannel:
    """Messages over one TLS stream. Every failure is a PairingError or LinkError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._send_key: bytes | None = None
        self._receive_key: bytes | None = None
        self._sent = self._received = 0
        self._limit = MAX_UNPROVEN_BYTES

    def authenticate(self, send_key: bytes, receive_key: bytes) -> None:
        """From the next message on, both ways, nothing counts without its MAC."""
        self._send_key, self._receive_key, self._limit = send_key, receive_key, codec.MAX_MESSAGE_BYTES

    async def send(self, message: Message) -> bytes:
        """Send, and return the bytes of the message itself."""
        body = codec.encode(message, Message)
        payload = body
        if self._send_key is not None:
            payload = _mac(self._send_key, self._sent, body) + body
            self._sent += 1
        if len(payload) > self._limit:
            raise PairingError(f"a pairing message of {len(payload)} bytes; the limit is {self._limit}")
        try:
            self._writer.write(LENGTH.pack(len(payload)) + payload)
            await self._writer.drain()
        except OSError as error:
            raise LinkError("the other side hung up") from error
        return body

    async def receive(self, kind: type[M]) -> tuple[M, bytes]:
        """The next message, of that kind, and its bytes; PairingRefused becomes a PairingError with its reason."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            payload = await self._reader.readexactly(length) if length <= self._limit else b""
        except (asyncio.IncompleteReadError, OSError) as error:
            raise LinkError("the other side hung up") from error
        if length > self._limit:
            raise PairingError(f"a pairing message of {length} bytes; the limit is {self._limit}")
        if self._receive_key is not None:
            mac, payload = payload[:MAC_BYTES], payload[MAC_BYTES:]
            if not hmac.compare_digest(mac, _mac(self._receive_key, self._received, payload)):
                raise PairingError("a pairing message was tampered with")
            self._received += 1
        message = codec.decode(payload, Message)
        if isinstance(message, PairingRefused):
            raise PairingError(message.reason[:200])
        if not isinstance(message, kind):
            raise PairingError(f"the other side sent {type(message).__name__} out of turn")
        return message, payload


def _mac(key: bytes, sequence: int, body: bytes) -> bytes:
    return hmac.digest(key, SEQUENCE.pack(sequence) + body, sha256)
