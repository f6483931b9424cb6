"""`peerllm run`: ends when the model serves, or with the reason why not."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peerllm.cli.device import LocalDevice
from peerllm.cli.look import deployment_text
from peerllm.cli.terminal import printable
from peerllm.errors import BadInputError

BUILTIN = "builtin"
_PERCENT = re.compile(r"\d+(\.\d+)? ?%")


def run(args: argparse.Namespace) -> None:
    if args.quantize:
        raise BadInputError(f"--quantize {args.quantize} comes later: not in this version")
    device = LocalDevice(args.data)
    model = as_model(args.model)
    body = {"model": model, "objective": args.objective, "context": args.context, "slots": args.slots,
            "private": args.private}  # fmt: skip
    show_progress(device.lines("/peerllm/v1/run", body))
    served = [one for one in device.get("/peerllm/v1/status")["deployments"] if one["state"] == "serving"]
    for one in served:
        if one["model"] in {model, Path(model).name, args.model}:
            print(deployment_text(one))
    print(f"{printable(args.model)} serves at {device.url}")


def stop(args: argparse.Namespace) -> None:
    """`peerllm stop`."""
    LocalDevice(args.data).post("/peerllm/v1/stop", {"model": as_model(args.model)})
    print(f"Stopped {printable(args.model)}.")


def as_model(name: str) -> str:
    """A local directory as an absolute path (the device runs elsewhere), anything else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != BUILTIN and path.is_dir() else name


def show_progress(lines: Iterable[Mapping[str, Any]]) -> None:
    """A line for every message that differs in more than its percentage, a bar per device on a terminal; on stderr."""
    bars: dict[str, tqdm[Any]] = {}
    said = ""
    try:
        for line in lines:
            message = printable(str(line.get("message") or ""))
            kind = _PERCENT.sub("", message)
            if kind and kind != said:
                said = kind
                tqdm.write(f"{line.get('state')}: {message}", file=sys.stderr)
            if sys.stderr.isatty():
                _move(bars, line.get("devices") or {})
    finally:
        for bar in bars.values():
            bar.close()


def _move(bars: dict[str, tqdm[Any]], shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if name not in bars:
            bars[name] = tqdm(total=100, desc=printable(name)[:24], unit="%", leave=False, position=len(bars),
                              bar_format="{desc:<24} {bar} {percentage:3.0f} %")  # fmt: skip
        bars[name].n = round(100 * min(1.0, max(0.0, float(share))))
        bars[name].refresh()
