"""Torch as the runtime's backend."""

from __future__ import annotations

from collections.abc import Callable

from peerllm.engine.backend import Facts, versions
from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.config import DTYPES
from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import architectures, measure, runtime_bytes
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.place import PROCESSORS, find
from peerllm.engine.profiling import time_layers
from peerllm.engine.sampler import TorchSampler
from peerllm.engine.shard import load_shard
from peerllm.errors import BadInputError


class TorchBackend:
    """See backend.Backend."""

    sampler: Sampler = TorchSampler()

    def __init__(self) -> None:
        self._place = PROCESSORS

    def facts(self, compute: str = "cpu") -> Facts:
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
        return load_shard(spec, progress, self._place.device)

    def inspect(self, message: Inspect) -> Inspected:
        place = self._place
        found = inspect_model(message.model_dir, message.dtype, message.quantize, place.accelerator)
        return found.message(message.request)

    def measure(self, message: Measure) -> Measured:
        return measure(self._place).message(message.request)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        return time_layers(message, self.sampler, check, self._place)
