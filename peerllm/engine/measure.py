"""What this device computes: matrix-vector products (decode: memory) and matrix products (prefill: arithmetic)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from peerllm.engine.families import FAMILIES
from peerllm.engine.messages import Measured
from peerllm.engine.place import CPU, PROCESSORS, Place, turn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_BYTES = 64 << 20  # far larger than caches
ROWS, SIDE = 256, 768  # of the matrix product: a prompt's chunk, a small model's layer
BUDGET_S = 0.12  # per product and dtype; six of them stay below a second and a half


@dataclass(frozen=True, slots=True)
class Measurement:
    """The fields of messages.Measured but `request`; keys are dtype names."""

    gbytes_per_s: dict[str, float]
    gflops: dict[str, float]

    def message(self, request: int) -> Measured:
        """As the answer to a request."""
        return Measured(request, self.gbytes_per_s, self.gflops)


def measure(place: Place = PROCESSORS) -> Measurement:
    """Measure now, on processors with the threads torch was given; takes about a second."""
    speed, arithmetic, there = {}, {}, place.device

    def product(left: torch.Tensor, right: torch.Tensor) -> None:
        torch.mm(left, right)
        place.wait()

    with torch.inference_mode(), turn(there):
        # Zeros would be one page read again and again; one real buffer serves every dtype.
        buffer = torch.full((WEIGHT_BYTES,), 1, dtype=torch.uint8, device=there)
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            weights = buffer.view(dtype).view(-1, 4096)
            vector = torch.full((4096, 1), 1e-3, dtype=dtype, device=there)
            if place.accelerator:
                product(weights, vector)  # the first one loads libraries
            speed[name] = WEIGHT_BYTES / best_s(partial(product, weights, vector)) / 1e9
            left = torch.full((ROWS, SIDE), 1e-2, dtype=dtype, device=there)
            right = torch.full((SIDE, SIDE), 1e-2, dtype=dtype, device=there)
            arithmetic[name] = 2 * ROWS * SIDE * SIDE / best_s(partial(product, left, right.t())) / 1e9
    return Measurement(speed, arithmetic)


def best_s(work: Callable[[], object], budget_s: float = BUDGET_S) -> float:
    """Seconds of the fastest run within the budget (others were disturbed); at least one run, the first not alone."""
    best, end = float("inf"), time.perf_counter() + budget_s
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def runtime_bytes(device: torch.device = CPU) -> int:
    """Resident size of this process with all that a shard needs, before any is loaded."""
    # The first model built brings in libraries and tables that every later one shares.
    from peerllm.engine.config import parse_config
    from peerllm.engine.division import divide
    from peerllm.engine.names import recipes
    from peerllm.engine.probing import probe

    tiny = (
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "vocab_size": 8}'
    )
    division = divide(parse_config(tiny), torch.float32)
    probe(division, range(1))
    recipes(division, ())
    if device == CPU:
        import onnx.helper  # noqa: F401
        import onnxruntime  # noqa: F401
    else:
        torch.mm(*(torch.ones(1, 1, device=device) for _ in range(2))).to(CPU)  # its driver's libraries
    return int(psutil.Process().memory_info().rss)


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


def architectures() -> tuple[str, ...]:
    """Model types that this engine can divide."""
    return tuple(sorted(FAMILIES))
