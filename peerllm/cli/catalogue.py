"""`peerllm models`: what lies on this disk, what well-known models need, and which of them the household can hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peerllm.builtin import MODEL_DIR
from peerllm.cli.device import LocalDevice
from peerllm.cli.terminal import printable, table
from peerllm.daemon.weights.known_models import BUILTIN, KNOWN, memory_bytes
from peerllm.daemon.weights.on_disk import (
    DIRECTORIES_FILE,
    holds_model,
    in_hub_cache,
    served_directories,
    weights_of,
)
from peerllm.errors import PeerLLMError
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import BITS

FITS = {"int8": "yes", "int4": "with --quantize int4", "": "no", None: "?"}


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
    short = {one.hub_id: one.name for one in KNOWN}
    cached = dict(in_hub_cache())
    places = {BUILTIN: MODEL_DIR} | {short.get(name, name): directory for name, directory in cached.items()}
    served = (Path(name) for name in served_directories(data_dir / DIRECTORIES_FILE))
    places |= {str(directory): directory for directory in served if holds_model(directory)}
    on_disk = []
    for name, directory in places.items():
        size, numbers = weights_of(directory)
        on_disk.append({"name": name, "path": str(directory), "bytes": size, **needs(numbers, lent)})
    known = [
        {
            "name": one.name,
            "hub_id": one.hub_id,
            "layers": one.layers,
            "download_bytes": one.download_bytes,
            "gated": one.gated,
            "on_disk": one.hub_id in cached,
            **needs(one.millions * 10**6, lent),
        }
        for one in KNOWN
    ]
    return {"household": dict(lent) if lent is not None else None, "on_disk": on_disk, "known": known}


def needs(parameters: int, lent: Mapping[str, int] | None) -> dict[str, Any]:
    """About how much memory, rounded to each width; `fits`: the widest that the household has free, "" none."""
    sizes = {name: memory_bytes(parameters, bits) for name, bits in BITS.items()}
    fits = None
    if lent is not None and parameters:
        fits = next((name for name, size in sizes.items() if size <= lent["free_bytes"]), "")
    return {"parameters": parameters, **{f"{name}_bytes": size for name, size in sizes.items()}, "fits": fits}


def text(found: Mapping[str, Any]) -> str:
    rows = [("ON THIS DISK", "SIZE", "MEMORY AT INT8", "AT INT4", "FITS")]
    rows += [(one["name"], human_bytes(one["bytes"]), *_needs(one)) for one in found["on_disk"]]
    more = [("WELL KNOWN", "DOWNLOAD", "MEMORY AT INT8", "AT INT4", "FITS", "")]
    for one in found["known"]:
        about = "is on this disk" if one["on_disk"] else "needs an account (HF_TOKEN)" if one["gated"] else ""
        more.append((one["name"], human_bytes(one["download_bytes"]), *_needs(one), about))
    lent = found["household"]
    if lent is None:
        here = "No device runs here: start one with `peerllm up` to see what fits."
    else:
        here = f"The devices here lend {human_bytes(lent['lent_bytes'])}, {human_bytes(lent['free_bytes'])} are free."
    how = "Run one with `peerllm run NAME`; any other by its Hugging Face id (owner/name) or directory."
    return printable(f"{table(rows)}\n\n{table(more)}\n\n{here}\n{how}")


def _needs(one: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (human_bytes(one[f"{name}_bytes"]) if one["parameters"] else "?" for name in BITS)
    return (*sizes, FITS[one["fits"]])
