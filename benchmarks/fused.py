"""Blocks in two calls (ADR 13) against the same rounded matrices one by one: two shards in one process, asked in turn.

The model has Llama-3.2-1B's shape and random weights. Steps of one, four and eight sequences at 40 tokens of context
and a prompt, medians over rounds. Pin it: `taskset -c 0 python -m benchmarks.fused --threads 1`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.models import LLAMA_3_2_1B, write_llama
from peerllm.engine import assembly
from peerllm.engine.base import Segment
from peerllm.engine.inspect import inspect_model
from peerllm.engine.messages import LoadStage
from peerllm.engine.shard import TorchShard, load_shard
from tests.engine.architectures import stage

SLOTS, CONTEXT, BEFORE, STEPS, PROMPT = 8, 640, 40, 30, 512


def order(model: Path, first: int, last: int, quantize: str) -> LoadStage:
    """To load layers first..last."""
    found = inspect_model(model, "auto", quantize)
    return replace(stage(found, first, last, SLOTS, CONTEXT), quantize=quantize)


def one_by_one(spec: LoadStage) -> TorchShard:
    """The shard as it was before blocks were fused."""
    kept, assembly.fusible = assembly.fusible, lambda *_: {}
    try:
        return load_shard(spec)
    finally:
        assembly.fusible = kept


def step_ms(shard: TorchShard, sequences: int) -> float:
    """Median of some steps after a context."""
    for slot in range(sequences):
        shard.forward(torch.arange(BEFORE), [Segment(slot, 0, BEFORE, False)])
    took = []
    for position in range(BEFORE, BEFORE + STEPS):
        began = time.perf_counter()
        shard.forward(torch.arange(sequences), [Segment(slot, position, 1, True) for slot in range(sequences)])
        took.append(time.perf_counter() - began)
    for slot in range(sequences):
        shard.release(slot)
    return 1000 * median(took)


def prompt_ms(shard: TorchShard) -> float:
    began = time.perf_counter()
    shard.forward(torch.arange(PROMPT), [Segment(0, 0, PROMPT, True)])
    took = 1000 * (time.perf_counter() - began)
    shard.release(0)
    return took


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantize", choices=("int4", "int8"), default="int4")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="peerllm-bench-") as directory:
        model = write_llama(Path(directory) / "model", LLAMA_3_2_1B)
        spec = order(model, 0, int(str(LLAMA_3_2_1B["num_hidden_layers"])) + 1, args.quantize)
        shards = {"fused": load_shard(spec), "one by one": one_by_one(spec)}
        for _ in range(args.rounds):
            for name, shard in shards.items():
                for sequences in (1, 4, 8):
                    seen[f"{sequences} at once, {name}, ms"].append(step_ms(shard, sequences))
                seen[f"prompt of {PROMPT}, {name}, ms"].append(prompt_ms(shard))
    print(json.dumps({name: round(median(values), 2) for name, values in sorted(seen.items())}, indent=1))


if __name__ == "__main__":
    main()
