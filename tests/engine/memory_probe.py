"""Run by test_loader_memory as a process of its own: load ranges of layers and print what memory they cost."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import psutil

from peerllm.engine.backends import Backends
from peerllm.engine.messages import Inspect, LoadStage


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
    """`model_dir dtype quantize first-last ...`; prints bytes: {"weights", "loading", "runtime", "peak", "after"}."""
    backend = Backends()
    backend.facts()
    quantize = sys.argv[3]
    if quantize == "none" and sys.argv[2] != "float32":  # torch is in before it counts
        backend.inspect(Inspect(0, *sys.argv[1:4]))
    before = peak = anonymous_bytes()
    inspected = backend.inspect(Inspect(0, *sys.argv[1:4]))

    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    shards = []
    for argument in sys.argv[4:]:
        first, last = (int(number) for number in argument.split("-"))
        spec = LoadStage(
            1, "0" * 32, 1, 0, 1, first, last, inspected.config, sum(inspected.tensors[first : last + 1], ()),
            inspected.dtype, 2, 64, 16, 4, None, None, "0" * 64, quantize=inspected.quantize,
        )  # fmt: skip
        shards.append(backend.load(spec, lambda done, total: None))
    over.set()
    watcher.join()
    distinct = {key: nbytes for shard in shards for key, nbytes in shard.weights.items()}
    after = anonymous_bytes()
    peak = max(peak, after)
    weights, loading = sum(distinct.values()), inspected.working.loading
    print(json.dumps({"weights": weights, "loading": loading, "runtime": before, "peak": peak, "after": after}))


if __name__ == "__main__":
    main()
