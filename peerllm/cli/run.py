"""`peerllm run`: ends when the model serves, or with the reason why not."""

from __future__ import annotations

import argparse

from peerllm.cli.device import LocalDevice
from peerllm.cli.exactness import exactness
from peerllm.cli.look import deployment_text
from peerllm.cli.progress import progress
from peerllm.cli.served import meant
from peerllm.cli.terminal import printable


def run(args: argparse.Namespace) -> None:
    device = LocalDevice(args.data)
    model = meant(device.get("/peerllm/v1/status"), args.model)
    body = {"model": model, "name": args.name, "objective": args.objective,
            "context": args.context, "slots": args.slots,
            "private": args.private, "schedule": args.schedule, "prompt_chunk": args.prompt_chunk,
            **exactness(args)}  # fmt: skip
    name = ""
    for line in progress(device.lines("/peerllm/v1/run", body)):
        name = str(line.get("name", name))
    status = device.get("/peerllm/v1/status")
    for one in status["deployments"]:
        if one["name"] == name and one["coordinator"] == status["device"]["name"]:
            print(deployment_text(one))
    print(f"{printable(name)} serves at {device.url}")


def stop(args: argparse.Namespace) -> None:
    """`peerllm stop`."""
    device = LocalDevice(args.data)
    device.post("/peerllm/v1/stop", {"model": meant(device.get("/peerllm/v1/status"), args.model)})
    print(f"Stopped {printable(args.model)}.")
