"""Types of argparse: text in, a value out, or one line that says how to write it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import Any

from peerllm.daemon.decide.owner_limits import DAY_MINUTES
from peerllm.daemon.settings import PAIRING_PORT
from peerllm.types import COMPUTE

MIN_MEMORY_BYTES = 10**6  # less holds no layer of any model
MAX_RECORD_S = 600  # then the engines end a recording by themselves
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_HOURS = re.compile(r"(\d{1,2})(?::([0-5]\d))?-(\d{1,2})(?::([0-5]\d))?")
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def size(text: str) -> int:
    """Bytes in "4GB", "512MB", "1.5GiB" or plain bytes, no fewer than MIN_MEMORY_BYTES."""
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 4GB, 512MB or 1.5GiB")
    nbytes = int(float(found[1]) * unit)
    if nbytes < MIN_MEMORY_BYTES:
        meant = "it like 4GB or 512MB" if found[2] or nbytes < 1 else f"{found[1]}GB if you mean gigabytes"
        counted = f"{nbytes} byte{'s' * (nbytes != 1)}"
        raise argparse.ArgumentTypeError(f"{text!r} is {counted}, too little to lend; write {meant}")
    return nbytes


def pairing_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST" or "HOST:PORT": the port is the pairing door's where none is given."""
    if text.count(":") > 1 and not text.startswith("["):  # an IPv6 address alone
        return text, PAIRING_PORT
    return address(text if re.search(r":\d*$", text) else f"{text}:{PAIRING_PORT}")


def address(text: str, lowest: int = 1) -> tuple[str, int]:
    """(host, port) of "HOST:PORT"; an IPv6 host stands in brackets."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare and bare == host) or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    if not lowest <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; ports go from {lowest} to 65535")
    return bare, int(port)


def listening_address(text: str) -> tuple[str, int]:
    """Like `address`; port 0 takes a free one."""
    return address(text, lowest=0)


def port(text: str) -> int:
    """A port to listen on; 0 takes free ones. Two more above it are used."""
    if not text.isdecimal() or int(text) > 65533:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; ports go from 0 to 65533 here")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def compute_place(text: str) -> str:
    if COMPUTE.fullmatch(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N and mps")


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature; write a number from 0 to 100")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_RECORD_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write seconds, at most {MAX_RECORD_S}")
    return value


def or_word(word: str, value: int, otherwise: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type that takes `word` for `value`, and hands on everything else."""

    def read(text: str) -> Any:
        return value if text == word else otherwise(text)

    return read


def hours(text: str) -> tuple[int, int]:
    """Minutes of the day in "20-8" or "20:30-7:15"; "always" is the whole day."""
    found = _HOURS.fullmatch(text.strip())
    start, end = (int(found[1]) * 60 + int(found[2] or 0), int(found[3]) * 60 + int(found[4] or 0)) if found else (0, 0)
    if text == "always":
        return 0, DAY_MINUTES
    if start == end or max(start, end) > DAY_MINUTES:
        raise argparse.ArgumentTypeError(f"{text!r} are no hours; write them like 20-8 or 20:30-7, or always")
    return start, end


def percent(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 99:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage; write a number from 1 to 99, or off")
    return int(text)


def celsius(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 30 <= value <= 120:
        raise argparse.ArgumentTypeError(f"{text!r} is no limit; write degrees Celsius from 30 to 120, or off")
    return value
