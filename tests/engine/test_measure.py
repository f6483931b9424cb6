"""The quick measurement of a device."""

from __future__ import annotations

import gc
import mmap
import time

import torch

from peerllm.engine import measure
from peerllm.engine.families import FAMILIES


def test_measures_every_dtype_quickly():
    torch.set_num_threads(1)
    start = time.perf_counter()
    got = measure.measure()
    assert time.perf_counter() - start < 5  # 1.5 s on an idle machine
    assert set(got.gbytes_per_s) == set(got.gflops) == {"float32", "bfloat16", "float16"}
    assert all(0.01 < value < 1e5 for value in (*got.gbytes_per_s.values(), *got.gflops.values()))
    message = got.message(7)
    assert (message.request, message.gflops) == (7, got.gflops)


def test_the_fastest_run_counts(monkeypatch):
    now = [0.0]
    costs = iter([5.0, 1.0, 3.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.best_s(lambda: now.__setitem__(0, now[0] + next(costs)), budget_s=6.0) == 1.0


def test_memory_of_this_process():
    runtime = measure.runtime_bytes()
    gc.collect()
    before = measure.anonymous_bytes()
    assert 10e6 < before <= 1.1 * runtime
    block = mmap.mmap(
        -1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # not from the allocator, which may have room left
    for offset in range(0, len(block), mmap.PAGESIZE):
        block[offset] = 1
    assert 0.9 * len(block) < measure.anonymous_bytes() - before < 1.5 * len(block)
    block.close()


def test_what_it_offers():
    assert measure.architectures() == tuple(sorted(FAMILIES))
    assert {"gpt2", "opt", "gpt_neox", "llama", "qwen3"} < set(measure.architectures())
