"""Run by test_loader_memory as a process of its own: load ranges of layers and print what memory they cost."""

from __future__ import annotations

import json
import sys

import torch

from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import anonymous_bytes, runtime_bytes
from peerllm.engine.shard import load_shard
from tests.engine.architectures import quiet, stage


def main() -> None:
    """`model_dir dtype first-last ...`; prints {"weights", "runtime", "peak", "after"} in bytes."""
    torch.set_num_threads(1)
    quiet()
    runtime_bytes()
    before = peak = anonymous_bytes()
    inspection = inspect_model(sys.argv[1], sys.argv[2])

    def watch(done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())

    shards = []
    for argument in sys.argv[3:]:
        first, _, last = argument.partition("-")
        shards.append(load_shard(stage(inspection, int(first), int(last), slots=2, context=64), watch))
    distinct = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for shard in shards
        for tensor in shard._model.state_dict().values()
    }
    after = anonymous_bytes()
    peak = max(peak, after)
    print(json.dumps({"weights": sum(distinct.values()), "runtime": before, "peak": peak, "after": after}))


if __name__ == "__main__":
    main()
