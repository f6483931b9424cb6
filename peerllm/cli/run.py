"""`peerllm run`: ends when the model serves, or with the reason why not."""

from __future__ import annotations

import argparse
from pathlib import Path

from peerllm.cli.device import LocalDevice
from peerllm.cli.exactness import exactness
from peerllm.cli.look import deployment_text
from peerllm.cli.progress import as_model, show_progress
from peerllm.cli.terminal import printable


def run(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    model = as_model(args.model)
    body = {"model": model, "objective": args.objective, "context": args.context, "slots": args.slots,
            "private": args.private, "schedule": args.schedule, "prompt_chunk": args.prompt_chunk,
            **exactness(args)}  # fmt: skip
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
