"""The backend in torch and transformers: any family that can be divided, on processors or an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import psutil
import torch

from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.families import FAMILIES
from peerllm.engine.free_memory import empty_too
from peerllm.engine.kernels.accelerator import BROKEN, CPU, PROCESSORS, empty_caches, find, turn
from peerllm.engine.measure.compute_speed import measure, versions
from peerllm.engine.measure.layer_times import time_layers
from peerllm.engine.messages import Facts, Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.model.config import DTYPES, parse_config
from peerllm.engine.model.division import divide
from peerllm.engine.model.probing import probe
from peerllm.engine.model.tensor_names import recipes
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_mockup import TorchOutline
from peerllm.engine.model.torch_shard import load_shard
from peerllm.engine.sampler import SeededSampler
from peerllm.errors import BadInputError


class TorchBackend:
    """Implements base.Backend."""

    sampler: Sampler = SeededSampler()
    broken = BROKEN

    def __init__(self, threads: int = 1) -> None:
        self._place, self._threads = PROCESSORS, threads
        empty_too(empty_caches)

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        self._threads = threads
        self._settle()
        try:
            runtime = runtime_bytes(find(compute).device)
            self._place = place = find(compute)  # again: free memory once the libraries have taken theirs
        except RuntimeError as error:  # for example a GPU that is too old for this torch
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BadInputError(f"--compute {compute} does not work here: {reason}") from error
        own = place.name, place.memory_bytes, place.free_bytes
        return Facts(runtime, versions(), tuple(sorted(FAMILIES)), tuple(DTYPES), *own)

    def load(self, spec: LoadStage, progress: Progress) -> Shard:
        self._settle()
        return load_shard(spec, progress, self._place.device)

    def inspect(self, message: Inspect) -> Inspected:
        accelerator = self._place.device != CPU
        return inspect_model(message.model_dir, message.dtype, message.quantize, accelerator, message.request)

    def measure(self, message: Measure) -> Measured:
        self._settle()
        there = self._place.device
        with torch.inference_mode(), turn(there):
            return measure(message, partial(torch.ones, device=there), self._place.wait)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        self._settle()
        # This thread's CPU time leaves out other threads of ours and accelerators.
        alone = self._place.device == CPU and torch.get_num_threads() == 1
        clock = time.thread_time if alone else time.perf_counter
        return time_layers(message, TorchOutline(message, self._place.device), self.sampler, check, clock)

    def _settle(self) -> None:
        """Set torch's thread count, which torch keeps for each calling thread."""
        torch.set_num_threads(self._threads)


def runtime_bytes(device: torch.device = CPU) -> int:
    """Resident size of this process with everything that a shard needs, before any shard is loaded."""
    # The first model that is built loads libraries and tables that all later ones share.
    tiny = (
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "vocab_size": 8}'
    )
    division = divide(parse_config(tiny), torch.float32)
    probe(division, range(1))
    recipes(division, ())
    if device != CPU:
        torch.mm(*(torch.ones(1, 1, device=device) for _ in range(2))).to(CPU)  # loads the driver's libraries
    return int(psutil.Process().memory_info().rss)
