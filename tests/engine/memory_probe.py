"""Run by test_loader_memory as a process of its own: load ranges of layers and print what memory they cost."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace

import torch

from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import anonymous_bytes, runtime_bytes
from peerllm.engine.shard import load_shard
from tests.engine.architectures import quiet, stage


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
