"""`peerllm status` and `peerllm devices`: the household as text, or the status object as it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.terminal import human_bytes, layer_bar, printable, table

Status = Mapping[str, Any]


def status(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    found = device.get("/peerllm/v1/status")
    if args.json:
        print(json.dumps(found))
        return
    print(f"{printable(found['device']['name'])}: {device.url}\n")
    print(devices_text(found))
    print()
    print(deployments_text(found))


def devices(args: argparse.Namespace) -> None:
    found = LocalDevice(args.data).get("/peerllm/v1/status")
    print(json.dumps(found["devices"]) if args.json else devices_text(found))


def devices_text(found: Status) -> str:
    rows = [("DEVICE", "STATE", "MEMORY", "LENT", "USED", "ID")]
    for one in found["devices"]:
        here = " (this one)" if one["id"] == found["device"]["id"] else ""
        rows.append((
            one["name"] + here, one["state"], human_bytes(one["memory_bytes"]), human_bytes(one["lent_bytes"]),
            human_bytes(one.get("promised_bytes", 0)), one["id"][:12],
        ))  # fmt: skip
    lines = [table(rows)]
    lines += [f"{one['name']}: {one['problem']}" for one in found["devices"] if one.get("problem")]
    strangers = [str(one["name"]) for one in found.get("nearby", ())]
    if strangers:
        lines.append(f"Nearby, not of this household: {', '.join(strangers)}")
    return "\n".join([lines[0], *map(printable, lines[1:])])


def deployments_text(found: Status) -> str:
    """Each deployment with its stages drawn over the model's layers."""
    if not found["deployments"]:
        return "No model is served. Start the built-in one with: peerllm run builtin"
    return "\n\n".join(deployment_text(one) for one in found["deployments"])


def deployment_text(one: Mapping[str, Any]) -> str:
    head = f"{one['model']}: {one['state']}, coordinated by {one['coordinator']}, epoch {one['epoch']}"
    if one.get("reason"):
        head += f" ({one['reason']})"
    stages = (one.get("plan") or {}).get("stages") or ()
    if not stages:
        return printable(head)
    layers = max(int(stage["last_layer"]) for stage in stages) + 1
    rows = [("DEVICE", "LAYERS", f"of {layers}", "MEMORY")]
    for stage in stages:
        first, last = int(stage["first_layer"]), int(stage["last_layer"])
        bar = layer_bar(first, last, layers)
        rows.append((stage["device"], f"{first}-{last}", bar, human_bytes(stage["memory_bytes"])))
    return f"{printable(head)}\n{table(rows)}"
