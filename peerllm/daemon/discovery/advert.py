"""What a device says of itself in its mDNS TXT record. All of it is untrusted until TLS says who speaks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

SHORT_ID_DIGITS = 16
MAX_NAME_CHARS = 64
MAX_VALUE_BYTES = 200  # a TXT string holds 255 bytes, its key included
MAX_FIELDS = 32
MAX_INTEGER = 2**53
SERIAL_KEY = "n"  # its value grows with each advert of one daemon
_SHORT_ID = re.compile(r"[0-9a-f]{16}")
_DOOR = re.compile(r"[0-9A-Za-z]{2}")
_INTEGER = re.compile(r"[0-9]{1,16}")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


@dataclass(frozen=True, slots=True)
class Advert:
    """Protocol version, ports, truncated id, memory, compute profile and bandwidth of one device."""

    short_id: str
    name: str
    protocol: int
    port: int
    memory_bytes: int = 0
    gbytes_per_s: float = 0.0
    gflops: float = 0.0
    mbps: float = 0.0
    door: str = ""  # the open pairing door's name, "" when it is shut
    pairing_port: int = 0

    def __post_init__(self) -> None:
        if not _SHORT_ID.fullmatch(self.short_id):
            raise ValueError(f"no truncated device id: {self.short_id[:40]!r}")
        if not self.name or len(self.name) > MAX_NAME_CHARS or not self.name.isprintable():
            raise ValueError("the name is empty, too long or not printable")
        if not 0 < self.port < 65536 or not 0 <= self.pairing_port < 65536:
            raise ValueError(f"no port: {self.port}, {self.pairing_port}")
        if not 0 <= self.memory_bytes <= MAX_INTEGER or not 0 <= self.protocol <= MAX_INTEGER:
            raise ValueError("a number is out of range")
        if not all(math.isfinite(n) and n >= 0 for n in (self.gbytes_per_s, self.gflops, self.mbps)):
            raise ValueError("a rate is out of range")
        if (self.door and not _DOOR.fullmatch(self.door)) or bool(self.door) != bool(self.pairing_port):
            raise ValueError("a door has a name of two characters and a port, or neither")


def to_txt(advert: Advert) -> dict[str, str]:
    """The TXT record of `advert`."""
    txt = {
        "v": str(advert.protocol),
        "id": advert.short_id,
        "name": advert.name,
        "port": str(advert.port),
        "mem": str(advert.memory_bytes),
        "gbps": _rate(advert.gbytes_per_s),
        "gflops": _rate(advert.gflops),
        "mbps": _rate(advert.mbps),
    }
    if advert.door:
        txt |= {"door": advert.door, "pair": str(advert.pairing_port)}
    return txt


def from_txt(txt: Mapping[bytes, bytes | None]) -> Advert:
    """The advert in a TXT record; ValueError if a value is not of its type or length. Unknown keys are ignored."""
    if len(txt) > MAX_FIELDS:
        raise ValueError(f"{len(txt)} fields; the limit is {MAX_FIELDS}")
    values: dict[str, str] = {}
    for key, value in txt.items():
        if value is not None and len(key) <= 16 and len(value) <= MAX_VALUE_BYTES:
            values[key.decode("ascii", "replace")] = value.decode()
    return Advert(
        short_id=values.get("id", ""),
        name=values.get("name", ""),
        protocol=_integer(values.get("v", "")),
        port=_integer(values.get("port", "")),
        memory_bytes=_integer(values.get("mem", "0")),
        gbytes_per_s=_number(values.get("gbps", "0")),
        gflops=_number(values.get("gflops", "0")),
        mbps=_number(values.get("mbps", "0")),
        door=values.get("door", ""),
        pairing_port=_integer(values.get("pair", "0")),
    )


def serial_of(txt: Mapping[bytes, bytes | None]) -> int:
    """Which of its device's adverts this is, 0 where it does not say; ValueError if that is no whole number."""
    value = txt.get(SERIAL_KEY.encode())
    return _integer(value.decode()) if value is not None else 0


def printable_name(name: str) -> str:
    """`name` as it may stand in an advert: printable, neither empty nor too long."""
    clean = "".join(c if c.isprintable() else "?" for c in name)[:MAX_NAME_CHARS]
    while len(clean.encode()) > MAX_VALUE_BYTES:
        clean = clean[:-1]
    return clean or "device"


def _rate(value: float) -> str:
    return f"{min(max(value, 0.0), 999_999_999.0):.1f}" if math.isfinite(value) else "0.0"


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"whole number expected, not {text[:40]!r}")
    return int(text)


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"number expected, not {text[:40]!r}")
    return float(text)
