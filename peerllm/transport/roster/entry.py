"""One signed statement: this device belongs to the household, or no longer does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from struct import Struct

from peerllm.errors import AuthenticationError, BadInputError
from peerllm.transport.identity import Identity, canonical_pem, fingerprint, parse_certificate, verify
from peerllm.types import DeviceId

MAX_NAME_CHARACTERS = 64
MAX_COUNTER = 2**53 - 1  # every JSON reader keeps it exact
MAX_INTRODUCTION = MAX_COUNTER - 1  # no introduction can be so high that a removal could not be higher
SIGNATURE_DIGITS = 128
DOMAIN = b"peerllm roster entry 1\0"
LENGTH = Struct("<I")
COUNTER = Struct("<Q?")


class ForgedError(AuthenticationError):
    """An entry that nothing one may yet learn can make true."""


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """`introducer` says of `device`: it is one of us (or, `removed`: no more). `counter` orders what is said of it."""

    device: DeviceId
    name: str
    certificate_pem: str
    introducer: DeviceId
    counter: int
    removed: bool
    signature: str  # 128 hex digits: Ed25519 by the introducer over `signed_bytes`

    @property
    def rank(self) -> tuple[int, str]:
        """Of two statements of one kind about one device the higher stands."""
        return self.counter, self.signature

    def signed_bytes(self) -> bytes:
        """What the signature covers. The certificate is in it by the device id, its hash."""
        fields = (bytes.fromhex(self.device), bytes.fromhex(self.introducer), self.name.encode())
        body = b"".join(LENGTH.pack(len(field)) + field for field in fields)
        return DOMAIN + body + COUNTER.pack(self.counter, self.removed)


def sign_entry(identity: Identity, certificate_pem: str, name: str, counter: int, removed: bool = False) -> RosterEntry:
    """A statement by this device; BadInputError if the certificate or the name cannot be."""
    name = clean_name(name)
    pem = canonical_pem(certificate_pem)
    device = fingerprint(parse_certificate(pem)[0])
    entry = RosterEntry(device, name, pem, identity.device, min(counter, most_counter(removed)), removed, "")
    return replace(entry, signature=identity.sign(entry.signed_bytes()))


def most_counter(removed: bool) -> int:
    """The highest counter of a removal, or of an introduction."""
    return MAX_COUNTER if removed else MAX_INTRODUCTION


def clean_name(name: str) -> str:
    """A device's name fit to show: printable, 1 to MAX_NAME_CHARACTERS; BadInputError if nothing is left."""
    cleaned = "".join(character for character in name.strip() if character.isprintable())[:MAX_NAME_CHARACTERS].strip()
    if not cleaned:
        raise BadInputError(f"{name!r} cannot be a device's name")
    return cleaned


def check_entry(entry: RosterEntry) -> None:
    """ForgedError unless the entry is well-formed and its certificate is its device's."""
    if not 1 <= entry.counter <= most_counter(entry.removed):
        raise ForgedError(f"an entry's counter is {entry.counter}")
    if len(entry.name) > MAX_NAME_CHARACTERS or not entry.name.isprintable() or not entry.name.strip():
        raise ForgedError(f"an entry's name is {entry.name[:MAX_NAME_CHARACTERS]!r}")
    if len(entry.signature) != SIGNATURE_DIGITS or len(entry.introducer) != 64:
        raise ForgedError("an entry's signature or introducer is malformed")
    if _device_of(entry.certificate_pem) != entry.device:
        raise ForgedError(f"the entry of {entry.device[:8]} holds another device's certificate")


def check_signature(entry: RosterEntry, introducer_pem: str) -> None:
    """ForgedError unless the introducer signed the entry."""
    try:
        verify(introducer_pem, entry.signature, entry.signed_bytes())
    except (ValueError, AuthenticationError) as error:
        raise ForgedError(f"the entry of {entry.device[:8]} is not signed by {entry.introducer[:8]}") from error


@lru_cache(maxsize=1024)
def _device_of(pem: str) -> DeviceId:
    """Device id of a certificate in exactly the PEM we write ourselves; empty for anything else."""
    try:
        return fingerprint(parse_certificate(pem)[0]) if canonical_pem(pem) == pem else ""
    except BadInputError:
        return ""
