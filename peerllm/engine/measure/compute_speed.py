"""What this device computes, matrix-vector products (decode: memory) and matrix products (prefill), and with what."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from peerllm.engine.messages import Measure, Measured

WEIGHT_BYTES = 64 << 20  # far larger than most caches
ROWS, SIDE = 256, 768  # of the matrix product: a prompt's chunk, a small model's layer
BUDGET_S = 0.12  # per product
ONES = partial(np.ones, dtype=np.float32)  # real memory: zeros would be one page read again and again
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "aiohttp", "onnxruntime", "onnx", "peerllm")


def measure(message: Measure, ones: Callable[..., Any] = ONES, wait: Callable[[], None] = lambda: None) -> Measured:
    """Measure now, in float32, with matrices of ones; `wait` returns when their products are done."""
    weights, vector = ones((WEIGHT_BYTES // 4 // 4096, 4096)), ones((4096, 1))
    left, right = ones((ROWS, SIDE)), ones((SIDE, SIDE))

    def read() -> None:
        weights @ vector
        wait()

    def compute() -> None:
        left @ right
        wait()

    read()  # the first one loads libraries, or finds cold caches
    compute()
    speed, arithmetic = WEIGHT_BYTES / best_s(read) / 1e9, 2 * ROWS * SIDE * SIDE / best_s(compute) / 1e9
    return Measured(message.request, {"float32": speed}, {"float32": arithmetic})


def best_s(work: Callable[[], object], budget_s: float = BUDGET_S) -> float:
    """Seconds of the fastest run within the budget (others were disturbed); at least one run."""
    best, end = float("inf"), time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def versions() -> dict[str, str]:
    """Library versions by name, Python's among them."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a board's own build may come without metadata
            found[library] = "unknown"
    return found
