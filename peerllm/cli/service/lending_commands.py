"""`peerllm pause`, `peerllm resume` and `peerllm limits`: what this device lends, changed while it runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.terminal import printable, table
from peerllm.daemon.decide.owner_limits import hours_text
from peerllm.planner.cost.byte_sizes import human_bytes

OPTIONS = {"memory": "memory_bytes", "threads": "threads", "hours": "hours", "battery": "battery_percent",
           "hot": "hot_celsius"}  # fmt: skip


def pause(args: argparse.Namespace) -> None:
    LocalDevice(args.data).post("/peerllm/v1/pause", {})
    print("Paused: others take over what this device holds, then it lends nothing until you type: peerllm resume")


def resume(args: argparse.Namespace) -> None:
    found = LocalDevice(args.data).post("/peerllm/v1/resume", {})
    left = found["leaving"]
    print(printable(f"Resumed, but it still lends nothing: {left}") if left else "Resumed: this device lends again.")


def limits(args: argparse.Namespace) -> None:
    """Changes those that are given, and shows all."""
    device = LocalDevice(args.data)
    changes = {key: getattr(args, option) for option, key in OPTIONS.items() if getattr(args, option) is not None}
    path = "/peerllm/v1/limits"
    found = device.post(path, changes) if changes else device.get(path)
    print(json.dumps(found) if args.json else limits_text(found))


def limits_text(found: Mapping[str, Any]) -> str:
    rows = [("LIMIT", "", "CHANGE IT WITH")]
    memory, hours = found["memory_bytes"], found["hours"]
    battery, hot = found["battery_percent"], found["hot_celsius"]
    rows += [
        ("memory", f"at most {human_bytes(memory)}" if memory else "what is free, less a reserve", "--memory 4GB|free"),
        ("processors", str(found["threads"] or "all"), "--threads N|all"),
        ("hours", f"from {hours_text(hours)}" if hours else "always", "--hours 20-8|always"),
        ("battery", f"down to {battery} %" if battery else "down to the end", "--battery 30|off"),
        ("heat", f"below {hot:g} °C" if hot else "any", "--hot 90|off"),
    ]
    now = printable(found["leaving"]) if found["leaving"] else "lends"
    return f"{table(rows)}\nNow: {now}"
