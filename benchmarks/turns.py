"""What one sequence over two cores can reach: halves of a shard in two processes that take turns, nothing between them.

Each process is pinned to a core and holds half of the model's blocks (the second the head too). They wait for each
other on a socket pair in three ways: asleep, polling, and with dry passes of the coming step (engine/kernels/dry.py),
a few steps in each way by turns. Before and after, the whole in one process on either core. No network, no daemon, no
event loop: what is lost is lost to taking turns. Medians.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import struct
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.fused import BEFORE, order
from benchmarks.models import LLAMA_3_2_1B, write_llama
from peerllm.engine.base import Segment
from peerllm.engine.shard import TorchShard, load_shard

WHOLE, RUN, LAST = 60, 6, 17  # steps in one process; in one way of waiting, the first of which does not count; the head
WAYS = ("asleep", "polling", "with dry passes")
STEP = [Segment(0, BEFORE, 1, True)]  # the same again and again
AT = struct.Struct("d")  # when a half was computed
Times = defaultdict[str, list[float]]


def ready(model: Path, first: int, last: int, quantize: str) -> tuple[TorchShard, torch.Tensor]:
    """A shard with some context and its first step, and what to give it for a step."""
    shard = load_shard(order(model, first, last, quantize))
    hidden = int(str(LLAMA_3_2_1B["hidden_size"]))
    before = torch.arange(BEFORE) if first == 0 else torch.randn(BEFORE, hidden).bfloat16()
    shard.forward(before, [Segment(0, 0, BEFORE, False)])
    shard.forward(before[:1], STEP)
    return shard, before[:1]


def receive(link: socket.socket, way: str, shard: TorchShard, inputs: torch.Tensor) -> float:
    """When the other side was ready."""

    def came() -> bool:
        return bool(select.select([link], [], [], None if way == "asleep" else 0)[0])

    while not came():
        if way == "with dry passes":
            shard.rehearse(inputs, [Segment(0, BEFORE + 1, 1, True)], came)
    return float(AT.unpack(link.recv(AT.size))[0])


def whole(model: Path, core: int, quantize: str) -> list[float]:
    """Milliseconds of steps in one process."""
    os.sched_setaffinity(0, {core})
    shard, inputs = ready(model, 0, LAST, quantize)
    took = []
    for _ in range(WHOLE):
        began = time.perf_counter()
        shard.forward(inputs, STEP)
        took.append(1000 * (time.perf_counter() - began))
    shard.close()
    return took


def side(leads: bool, shard: TorchShard, inputs: torch.Tensor, rounds: int, link: socket.socket) -> Times:
    """Milliseconds of steps, of passes here, and from the other side's end of a pass until it is known here."""
    seen: Times = defaultdict(list)

    def compute(way: str, counts: bool) -> None:
        began = time.perf_counter()
        shard.forward(inputs, STEP)
        ended = time.perf_counter()
        link.send(AT.pack(ended))
        if counts:
            seen[f"{way}, {'first' if leads else 'second'} half"].append(1000 * (ended - began))

    for way in WAYS * rounds:
        last = time.perf_counter()
        for number in range(RUN):
            if leads:
                compute(way, number > 0)
            ready_at = receive(link, way, shard, inputs)
            now = time.perf_counter()
            if number:
                seen[f"{way}, told"].append(1000 * (now - ready_at))
            if not leads:
                compute(way, number > 0)
            elif number:
                seen[f"two, {way}"].append(1000 * (now - last))
            last = now
    return seen


def two(model: Path, cut: int, quantize: str, rounds: int) -> Times:
    here, there = socket.socketpair()
    if (child := os.fork()) == 0:
        os.sched_setaffinity(0, {1})
        half = ready(model, cut + 1, LAST, quantize)
        there.send(AT.pack(0))
        there.sendall(json.dumps(side(False, *half, rounds, there)).encode())
        os._exit(0)
    there.close()
    os.sched_setaffinity(0, {0})
    half = ready(model, 0, cut, quantize)
    here.recv(AT.size)
    seen = side(True, *half, rounds, here)
    with here.makefile("rb") as rest:
        for name, values in json.loads(rest.read()).items():
            seen[name] += values
    os.waitpid(child, 0)
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quantize", choices=("", "int4", "int8"), default="int4")
    parser.add_argument("--cut", type=int, default=9, help="the last layer of the first half")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    seen: Times = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        model = write_llama(Path(directory) / "model", LLAMA_3_2_1B)
        for turn in range(2):
            for core in range(2):
                seen[f"one, core {core}"] += whole(model, core, args.quantize)
            if not turn:
                seen |= two(model, args.cut, args.quantize, args.rounds)
    found = {name: median(values) for name, values in sorted(seen.items())}
    one = (found["one, core 0"] + found["one, core 1"]) / 2
    ratios = {f"one / two, {way}": round(one / found[f"two, {way}"], 3) for way in WAYS}
    print(json.dumps({f"{name}, ms": round(ms, 2) for name, ms in found.items()} | ratios, indent=1))


if __name__ == "__main__":
    main()
