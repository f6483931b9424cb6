"""`peerllm demo`: several devices on this machine, paired as a person would pair them, one model divided over them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from peerllm.cli.chat import answer_pieces
from peerllm.cli.demo.demo_devices import DemoDevice
from peerllm.cli.demo.demo_memory import replaceable_limit, sizes_of
from peerllm.cli.demo.demo_model import DemoModel, demo_model
from peerllm.cli.demo.demo_watch import DemoWatch
from peerllm.cli.device import LocalDevice, demo_note
from peerllm.cli.exactness import EXACT
from peerllm.cli.look import deployment_text, devices_text
from peerllm.cli.parser import default_data_dir
from peerllm.cli.progress import show_progress
from peerllm.cli.terminal import printable
from peerllm.daemon.decide.demand import DEFAULT_SLOTS
from peerllm.daemon.deployment.model_files import GGUF_CACHE
from peerllm.daemon.engine_link.machine import processors
from peerllm.errors import UnavailableError
from peerllm.planner.cost.byte_sizes import human_bytes

NAMES = ("laptop", "mini-pc", "jetson", "phone", "tablet", "desktop", "media-box", "old-laptop")
TOGETHER_S = 60.0  # seconds for the devices to see each other once they have paired
SLOTS = DEFAULT_SLOTS  # which all devices together have room for ...
FEWER_SLOTS = 2  # ... and with one less, so many
MOST_CONTEXT = 4096  # tokens: the more room answers take, the more evenly the three devices share a small model
MAX_ANSWER_TOKENS = 80


def run(args: argparse.Namespace) -> None:
    """Returns after Ctrl-C or SIGTERM, with every device ended."""
    say = _quiet if args.json else _say
    signal.signal(signal.SIGTERM, _as_interrupt)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="peerllm-demo-") as directory,
    ):
        model = demo_model(args.model, Path(directory) / NAMES[0] / GGUF_CACHE, args.json)
        if model.instead:
            say(f"{model.instead}\nSo this is the built-in model, which knows little; it shows that everything works.")
        form = ("float32", "none") if model.exact else ()
        sizes, fewer = (sizes_of(model.directory, slots, MOST_CONTEXT, *form) for slots in (SLOTS, FEWER_SLOTS))
        limit = replaceable_limit(sizes, fewer, args.devices)
        say(f"{model.name} takes {human_bytes(sizes.total)} with room for {SLOTS} answers at once.")
        say(f"Starting {args.devices} devices, each of which lends {human_bytes(limit)}, takes up to half a minute.")
        with (
            _devices(Path(directory), [limit] * args.devices, args.api, model.name) as devices,
            _noted(devices[0], args.json) as option,
        ):
            say("They are ready. Pairing them, then dividing the model over them.")
            _serve(devices, model, sizes.context, args)
            say(f"From a second terminal: peerllm chat{option}   (or peerllm status{option})")
            for device in devices[1:2]:
                say(f"While an answer is written, try: kill -9 {device.pid}   ({device.name} dies, the answer goes on)")
            say("Stop with Ctrl-C.")
            DemoWatch(devices, say).run()


@contextlib.contextmanager
def _noted(device: DemoDevice, quiet: bool) -> Iterator[str]:
    """The option with which other commands reach the demo: none, unless a device of this user runs already."""
    if quiet:  # a script is told where the data are
        yield ""
        return
    with demo_note(default_data_dir(), device.data_dir) as noted:
        yield "" if noted else f" --data {device.data_dir}"


@contextlib.contextmanager
def _devices(directory: Path, memory: Sequence[int], api: tuple[str, int], model: str) -> Iterator[list[DemoDevice]]:
    """The devices, started and ready, the first told what `model` comes; ended when the block is left, in any way."""
    threads = max(1, processors() // len(memory))
    with contextlib.ExitStack() as stack:
        devices = []
        for index, limit in enumerate(memory):
            where = api if index == 0 else ("127.0.0.1", 0)
            expected = "" if index else model
            device = DemoDevice(directory / NAMES[index], NAMES[index], limit, threads, where, expected)
            stack.callback(device.end)
            devices.append(device)
        stack.callback(_ask_all_to_end, devices)
        for device in devices:
            device.wait_ready()
        yield devices


def _ask_all_to_end(devices: list[DemoDevice]) -> None:
    """Together, so that they end at the same time."""
    for device in devices:
        device.ask_to_end()


def _wait_for_all(first: LocalDevice, names: Sequence[str]) -> None:
    """Until the first device sees every other one and knows that its engine runs."""
    deadline = time.monotonic() + TOGETHER_S
    path = "/peerllm/v1/status"
    while True:
        seen = {one["name"] for one in first.get(path)["devices"] if one["engine"] in ("running", "idle")}
        missing = [name for name in names if name not in seen]
        if not missing:
            return
        if time.monotonic() > deadline:
            raise UnavailableError(f"{', '.join(missing)} paired but did not come online within {TOGETHER_S:g} s")
        path = "/peerllm/v1/status?wait=1"


def _serve(devices: list[DemoDevice], model: DemoModel, context: int, args: argparse.Namespace) -> None:
    """Pair them, divide the model, show who holds what, ask one question."""
    first = LocalDevice(devices[0].data_dir)
    for device in devices[1:]:
        invitation = first.post("/peerllm/v1/invite", {})
        at = f"127.0.0.1:{invitation['port']}"
        LocalDevice(device.data_dir).post("/peerllm/v1/join", {"code": invitation["code"], "at": at})
    _wait_for_all(first, [device.name for device in devices])
    body = {"model": model.name, "context": context, **(EXACT if model.exact else {})}  # fewer slots when one is lost
    lines = first.lines("/peerllm/v1/run", body)
    if args.json:
        for _ in lines:
            pass
    else:
        show_progress(lines)
    status = first.get("/peerllm/v1/status")
    body = {"model": status["deployments"][0]["name"], "temperature": 0, "max_tokens": MAX_ANSWER_TOKENS}
    pieces = answer_pieces(first, body, [{"role": "user", "content": model.question}])
    if args.json:
        print(
            json.dumps(
                {
                    "url": first.url,
                    "question": model.question,
                    "answer": "".join(pieces),
                    "status": status,
                    "devices": [{"name": one.name, "data": str(one.data_dir), "pid": one.pid} for one in devices],
                }
            ),
            flush=True,
        )
        return
    print(f"\n{devices_text(status)}\n\n{deployment_text(status['deployments'][0])}\n\n> {model.question}")
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print(f"\n\nThe page: {first.url}", flush=True)
    if not args.no_browser and _has_screen():
        import webbrowser

        webbrowser.open(first.url)


def _has_screen() -> bool:
    if os.environ.get("CI") or not sys.stdout.isatty():
        return False
    return sys.platform in {"darwin", "win32"} or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _say(text: str) -> None:
    print(text, flush=True)


def _quiet(text: str) -> None:
    """With --json only the object is printed."""


def _as_interrupt(_: int, __: FrameType | None) -> Any:
    raise KeyboardInterrupt
