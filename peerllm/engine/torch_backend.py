"""Torch and transformers as the runtime's backend: any family that can be divided, on processors or an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peerllm.engine.backend import Facts, versions
from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.config import DTYPES
from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import architectures, measure, runtime_bytes
from peerllm.engine.memory import empty_too
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.place import BROKEN, PROCESSORS, empty_caches, find
from peerllm.engine.profiling import time_layers
from peerllm.engine.sampler import SeededSampler
from peerllm.engine.shard import load_shard
from peerllm.errors import BadInputError


class TorchBackend:
    """See backend.Backend."""

    sampler: Sampler = SeededSampler()
    broken = BROKEN

    def __init__(self) -> None:
        self._place, self._threads = PROCESSORS, 1
        empty_too(empty_caches)

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        self._threads = threads
        self._settle()
        try:
            runtime = runtime_bytes(find(compute).device)
            self._place = place = find(compute)  # what is free, with the libraries' share of its memory taken
        except RuntimeError as error:  # such as a GPU that is too old for this torch
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BadInputError(f"--compute {compute} does not work here: {reason}") from error
        return Facts(
            runtime, versions(), architectures(), tuple(DTYPES), place.name, place.memory_bytes, place.free_bytes
        )

    def load(self, spec: LoadStage, progress: Progress) -> Shard:
        self._settle()
        return load_shard(spec, progress, self._place.device)

    def inspect(self, message: Inspect) -> Inspected:
        found = inspect_model(message.model_dir, message.dtype, message.quantize, self._place.accelerator)
        return found.message(message.request)

    def measure(self, message: Measure) -> Measured:
        self._settle()
        return measure(self._place).message(message.request)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        self._settle()
        return time_layers(message, self.sampler, check, self._place)

    def _settle(self) -> None:
        """Torch counts threads by the thread that calls it."""
        torch.set_num_threads(self._threads)
