"""Run by test_loader_memory as a process of its own: load ranges of layers and print what memory they cost."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from peerllm.engine.inspect import inspect_model
from peerllm.engine.shard import load_shard
from peerllm.engine.torch_backend import runtime_bytes
from tests.engine.architectures import quiet, stage


def anonymous_bytes() -> int:
    """Of the resident size, what is not mapped from files: what a model's memory is counted by."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def main() -> None:
    """`model_dir dtype quantize first-last ...`; prints {"weights", "runtime", "peak", "after"} in bytes."""
    torch.set_num_threads(1)
    quiet()
    runtime_bytes()
    quantize = sys.argv[3].removeprefix("-")
    before = peak = anonymous_bytes()
    inspection = inspect_model(sys.argv[1], sys.argv[2], quantize)

    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    shards = []
    for argument in sys.argv[4:]:
        first, _, last = argument.partition("-")
        spec = replace(stage(inspection, int(first), int(last), slots=2, context=64), quantize=quantize)
        shards.append(load_shard(spec))
    over.set()
    watcher.join()
    distinct = {key: nbytes for shard in shards for key, nbytes in shard.weights.items()}
    after = anonymous_bytes()
    peak = max(peak, after)
    print(json.dumps({"weights": sum(distinct.values()), "runtime": before, "peak": peak, "after": after}))


if __name__ == "__main__":
    main()
