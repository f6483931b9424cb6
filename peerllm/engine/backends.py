"""Chooses what computes a model: the graph engine if its table has the family, else torch if it is installed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import psutil

from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.families import FAMILIES
from peerllm.engine.graph import table
from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import Described, describe
from peerllm.engine.graph.graph_inspect import layer_tensors, profile, working
from peerllm.engine.graph.graph_mockup import GraphOutline
from peerllm.engine.graph.load import load_shard
from peerllm.engine.graph.nodes import Graph, make_pool
from peerllm.engine.measure.compute_speed import measure, versions
from peerllm.engine.measure.layer_times import time_layers
from peerllm.engine.messages import Facts, Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers
from peerllm.engine.sampler import SeededSampler
from peerllm.engine.weights.checkpoint import read_model
from peerllm.engine.weights.formats import forms_of
from peerllm.errors import ModelError
from peerllm.types import STORED

if TYPE_CHECKING:
    from peerllm.engine.model.torch_backend import TorchBackend

MOST_REASON = 300  # characters of the reason why the graph engine does not compute a model
NEEDS_TORCH = "for that torch is needed: pip install 'peerllm[torch]'"


class Backends:
    """Implements base.Backend. torch is imported when a model needs it, or at the start for an accelerator."""

    sampler: Sampler = SeededSampler()

    def __init__(self) -> None:
        self._threads, self._compute = 1, "cpu"
        self._torch: TorchBackend | None = None

    @property
    def broken(self) -> tuple[type[BaseException], ...]:
        return () if self._torch is None else self._torch.broken

    def facts(self, compute: str = "cpu", threads: int = 1) -> Facts:
        self._threads, self._compute = threads, compute
        make_pool(threads)
        if compute != "cpu":
            return self._with_torch(f"--compute {compute}").facts(compute, threads)
        has_torch = all(find_spec(name) is not None for name in ("torch", "transformers"))
        families = FAMILIES if has_torch else table.FAMILIES
        dtypes = ("float32", "bfloat16", "float16") if has_torch else ("float32",)
        return Facts(runtime_bytes(), versions(), tuple(sorted(families)), dtypes)

    def load(self, spec: LoadStage, progress: Progress) -> Shard:
        described = self._described(spec.config, spec.dtype, spec.quantize)
        if isinstance(described, str):
            return self._with_torch(described).load(spec, progress)
        return load_shard(described, spec, self._threads, progress)

    def inspect(self, message: Inspect) -> Inspected:
        files = read_model(message.model_dir, message.dtype, message.quantize, self._compute != "cpu")
        described = self._described(files.config, files.dtype, files.quantize)
        forms_of(files.values)  # its reason is the clearer one
        if isinstance(described, str) and files.values.get("quantization_config"):
            raise ModelError(f"{described}; quantized checkpoints of that kind are not computed")
        if isinstance(described, str):
            return self._with_torch(described).inspect(message)
        model = described.model
        return Inspected(
            message.request,
            profile(described, files.name, files.quantize),
            model.family,
            files.config,
            "float32",
            model.hidden,
            model.vocabulary,
            model.max_context,
            files.stop_ids,
            layer_tensors(described, files.tensors),
            working(described, files.quantize),
            files.quantize,
            mixed_rows=described.own_inputs is not None,
        )

    def measure(self, message: Measure) -> Measured:
        return measure(message) if self._compute == "cpu" else self._with_torch("--compute").measure(message)

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        described = self._described(message.config, message.dtype, message.quantize)
        if isinstance(described, str):
            return self._with_torch(described).time_layers(message, check)
        # This thread's CPU time excludes other processes, but also other threads of ours.
        clock = time.thread_time if self._threads == 1 else time.perf_counter
        return time_layers(message, GraphOutline(described, message, self._threads), self.sampler, check, clock)

    def _described(self, config: str, dtype: str, quantize: str) -> Described | str:
        """The description for the graph engine, or the reason why it does not compute this model in this form."""
        if self._compute != "cpu":
            return f"the engine computes on {self._compute}"
        if dtype != "float32" and not quantize:
            return f"weights in {dtype} are to stay as they are (--quantize int8 rounds them, --exact takes float32)"
        try:
            values: Any = json.loads(config)
            return describe(values, quantize == STORED) if isinstance(values, dict) else "config.json is no JSON object"
        except (UnfitError, ValueError, RecursionError) as error:
            return str(error)[:MOST_REASON]

    def _with_torch(self, why: str) -> TorchBackend:
        if self._torch is None:
            try:
                from peerllm.engine.model.torch_backend import TorchBackend
            except ImportError as error:
                raise ModelError(f"{why}; {NEEDS_TORCH} ({error})") from error
            self._torch = TorchBackend(self._threads)
        return self._torch


def runtime_bytes() -> int:
    """Resident size of this process with everything that a graph needs, before a model is loaded."""
    graph = Graph()
    graph.add("Identity", graph.input("x", 1), output="y")
    graph.output("y", 1)
    graph.session()
    return int(psutil.Process().memory_info().rss)
