"""Torch as the runtime's backend."""

from __future__ import annotations

from collections.abc import Callable

from peerllm.engine.backend import Facts, versions
from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.config import DTYPES
from peerllm.engine.inspect import inspect_model
from peerllm.engine.measure import architectures, measure, runtime_bytes
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.profiling import time_layers
from peerllm.engine.sampler import TorchSampler
from peerllm.engine.shard import load_shard


class TorchBackend:
    """See backend.Backend."""

    sampler: Sampler = TorchSampler()

    def facts(self) -> Facts:
        return Facts(runtime_bytes(), versions(), architectures(), tuple(DTYPES))

    def load(self, spec: LoadStage, progress: Progress) -> Shard:
        return load_shard(spec, progress)

    def inspect(self, message: Inspect) -> Inspected:
        return inspect_model(message.model_dir, message.dtype, message.quantize).message(message.request)

    def measure(self, message: Measure) -> Measured:
        return measure().message(message.request)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        return time_layers(message, self.sampler, check)
