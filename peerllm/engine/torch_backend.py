"""Torch and transformers as the runtime's backend: any family that can be divided, on processors or an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peerllm.engine.backend import Facts, versions
from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.config import DTYPES
from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import architectures, measure, runtime_bytes
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.place import BROKEN, PROCESSORS, find, free_unused
from peerllm.engine.profiling import time_layers
from peerllm.engine.sampler import TorchSampler
from peerllm.engine.shard import load_shard
from peerllm.errors import BadInputError


class TorchBackend:
    """See backend.Backend."""

    sampler: Sampler = TorchSampler()
    broken = BROKEN  # after such an error the process has to be started anew

    def __init__(self) -> None:
        self._place, self._threads = PROCESSORS, torch.get_num_threads()

    def facts(self, compute: str = "cpu", threads: int | None = None) -> Facts:
        self._threads = threads or self._threads
        torch.set_num_threads(self._threads)
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
        torch.set_num_threads(self._threads)
        return load_shard(spec, progress, self._place.device)

    def inspect(self, message: Inspect) -> Inspected:
        found = inspect_model(message.model_dir, message.dtype, message.quantize, self._place.accelerator)
        return found.message(message.request)

    def measure(self, message: Measure) -> Measured:
        torch.set_num_threads(self._threads)
        return measure(self._place).message(message.request)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        torch.set_num_threads(self._threads)
        return time_layers(message, self.sampler, check, self._place)

    def free(self) -> None:
        """What a shard has left unused on an accelerator goes back to the system."""
        free_unused()
