"""`peerllm models`: what lies on this disk, what well-known models need, and which of them the household can hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.terminal import printable, table
from peerllm.daemon.shelf.disk_models import places_on_disk
from peerllm.daemon.weights.known_models import KNOWN, memory_bytes, stored_memory_bytes
from peerllm.daemon.weights.on_disk import weights_of
from peerllm.errors import PeerLLMError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import BITS


def run(args: argparse.Namespace) -> None:
    found = catalogue(args.data, household(args.data))
    print(json.dumps(found) if args.json else text(found))


def household(data_dir: Path) -> dict[str, int] | None:
    """What the devices that are here lend, and what of it is free; None where no device runs on this machine."""
    try:
        devices = LocalDevice(data_dir).get("/peerllm/v1/status")["devices"]
    except PeerLLMError:
        return None
    here = [one for one in devices if one["state"] == "online"]
    lent = sum(one["lent_bytes"] for one in here)
    return {"lent_bytes": lent, "free_bytes": lent - sum(one["promised_bytes"] for one in here)} if here else None


def catalogue(data_dir: Path, lent: Mapping[str, int] | None) -> dict[str, Any]:
    """The object of `peerllm models --json`."""
    places = places_on_disk(data_dir)
    on_disk = []
    for name, paths in places.items():
        held = weights_of(paths)
        about = {"name": name, "path": str(paths[0]), "bytes": held.nbytes, "form": held.form}
        on_disk.append({**about, **needs(held.numbers, stored_memory_bytes(held), lent)})
    known = [
        {
            "name": one.name,
            "hub_id": one.hub_id,
            "layers": one.layers,
            "download_bytes": one.download_bytes,
            "form": one.form or "BF16",
            "on_disk": one.name in places,
            **needs(one.loaded, one.stored_memory_bytes, lent),
            "parameters": one.millions * 10**6,
        }
        for one in KNOWN
    ]
    return {"household": dict(lent) if lent is not None else None, "on_disk": on_disk, "known": known}


def needs(parameters: int, stored: int, lent: Mapping[str, int] | None) -> dict[str, Any]:
    """About how much memory, in each form; `fits`: the first form for which the household has room, "" none.

    `stored`: bytes of memory as the files store it; 0: 16-bit numbers, which are rounded while they are loaded.
    """
    sizes = {"stored": stored or None}
    sizes |= {name: memory_bytes(parameters, bits) if parameters else None for name, bits in BITS.items()}
    fits = None
    if lent is not None and (stored or parameters):
        fits = next((name for name, size in sizes.items() if size and size <= lent["free_bytes"]), "")
    return {"parameters": parameters, **{f"{name}_bytes": size for name, size in sizes.items()}, "fits": fits}


def text(found: Mapping[str, Any]) -> str:
    rows = [("ON THIS DISK", "FORM", "SIZE", "MEMORY", "AT INT4", "FITS")]
    rows += [(one["name"], one["form"], human_bytes(one["bytes"]), *_needs(one)) for one in found["on_disk"]]
    more = [("WELL KNOWN", "FORM", "DOWNLOAD", "MEMORY", "AT INT4", "FITS", "")]
    for one in found["known"]:
        about = "is on this disk" if one["on_disk"] else ""
        more.append((one["name"], one["form"], human_bytes(one["download_bytes"]), *_needs(one), about))
    lent = found["household"]
    if lent is None:
        here = "No device runs here: start one with `peerllm up` to see what fits."
    else:
        here = f"The devices here lend {human_bytes(lent['lent_bytes'])}, {human_bytes(lent['free_bytes'])} are free."
    how = (
        "MEMORY is about what all devices together lend: 16-bit models are rounded to 8 bits, GGUF files are not.\n"
        "Run one with `peerllm run NAME`; any other by its Hugging Face id (owner/name, of GGUF files also\n"
        "owner/name:Q4_K_M), its directory or its .gguf file."
    )
    return printable(f"{table(rows)}\n\n{table(more)}\n\n{here}\n{how}")


def _needs(one: Mapping[str, Any]) -> tuple[str, ...]:
    usual = "stored" if one["stored_bytes"] else "int8"
    sizes = (one[f"{usual}_bytes"], one["int4_bytes"])
    fits = {None: "?", "": "no", usual: "yes"}.get(one["fits"], f"with --quantize {one['fits']}")
    return (*(human_bytes(size) if size else "?" for size in sizes), fits)
