"""What one sequence over two cores can reach: halves of a shard in two processes that take turns, nothing between them.

Each process is pinned to a core and holds half of the model's blocks (the second the head too); they wait for each
other on a socket pair, once sleeping and once spinning. Against them the whole in one process on the first core, in
turn, medians over all steps. No network, no daemon, no event loop: what is lost is lost to taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
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

TURNS, LAST = 40, 17  # steps in a row; the head's layer
TURN, SLEEPING, SPINNING, END = b"t", b"s", b"p", b"e"


def receive(link: socket.socket, spinning: bool) -> bytes:
    link.setblocking(not spinning)
    while True:
        try:
            return link.recv(1)
        except BlockingIOError:
            continue


def step(shard: TorchShard, inputs: torch.Tensor, number: int) -> None:
    shard.forward(inputs, [Segment(0, BEFORE + number, 1, True)])


def ready(model: Path, first: int, last: int, quantize: str) -> tuple[TorchShard, torch.Tensor]:
    """A shard with some context, and what to give it for a step."""
    shard = load_shard(order(model, first, last, quantize))
    hidden = int(str(LLAMA_3_2_1B["hidden_size"]))
    before = torch.arange(BEFORE) if first == 0 else torch.randn(BEFORE, hidden).bfloat16()
    shard.forward(before, [Segment(0, 0, BEFORE, False)])
    return shard, before[:1]


def second(model: Path, cut: int, quantize: str, link: socket.socket) -> None:
    """The other process: takes its turns until it is told to end."""
    os.sched_setaffinity(0, {1})
    shard, inputs = ready(model, cut + 1, LAST, quantize)
    link.send(TURN)
    while (how := receive(link, spinning=False)) != END:
        for number in range(TURNS):
            receive(link, how == SPINNING)
            step(shard, inputs, number)
            link.send(TURN)


def first(model: Path, cut: int, quantize: str, rounds: int, link: socket.socket) -> dict[str, list[float]]:
    """Milliseconds a step."""
    os.sched_setaffinity(0, {0})
    whole, inputs = ready(model, 0, LAST, quantize)
    half, _ = ready(model, 0, cut, quantize)
    seen: dict[str, list[float]] = defaultdict(list)
    receive(link, spinning=False)
    for _ in range(rounds):
        for number in range(TURNS):
            began = time.perf_counter()
            step(whole, inputs, number)
            seen["one process"].append(1000 * (time.perf_counter() - began))
        for name, how in (("two, sleeping", SLEEPING), ("two, spinning", SPINNING)):
            link.setblocking(True)
            link.send(how)
            for number in range(TURNS):
                began = time.perf_counter()
                step(half, inputs, number)
                link.send(TURN)
                receive(link, how == SPINNING)
                seen[name].append(1000 * (time.perf_counter() - began))
    link.setblocking(True)
    link.send(END)
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quantize", choices=("", "int4", "int8"), default="int4")
    parser.add_argument("--cut", type=int, default=9, help="the last layer of the first half")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        model = write_llama(Path(directory) / "model", LLAMA_3_2_1B)
        here, there = socket.socketpair()
        if (child := os.fork()) == 0:
            second(model, args.cut, args.quantize, there)
            os._exit(0)
        seen = first(model, args.cut, args.quantize, args.rounds, here)
        os.waitpid(child, 0)
    found = {name: median(values) for name, values in seen.items()}
    ratios = {f"{name}, ratio": round(found["one process"] / ms, 3) for name, ms in found.items()}
    print(json.dumps({f"{name}, ms": round(ms, 2) for name, ms in found.items()} | ratios, indent=1))


if __name__ == "__main__":
    main()
