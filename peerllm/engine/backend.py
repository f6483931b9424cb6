"""What the runtime needs of a compute backend, and torch's, imported only when an engine starts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from peerllm.engine.base import Progress, Sampler, Shard
from peerllm.engine.messages import Inspect, Inspected, LayersTimed, LoadStage, Measure, Measured, TimeLayers

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "aiohttp", "onnxruntime", "onnx", "peerllm")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a daemon wants to know of its engine. `runtime_bytes`: resident size with all libraries and no model."""

    runtime_bytes: int
    versions: Mapping[str, str]
    architectures: tuple[str, ...]
    dtypes: tuple[str, ...]


class Backend(Protocol):
    """All but `sampler` run in the loader thread or a helper's, not in the compute thread."""

    sampler: Sampler

    def facts(self) -> Facts: ...
    def load(self, spec: LoadStage, progress: Progress) -> Shard: ...
    def inspect(self, message: Inspect) -> Inspected: ...
    def measure(self, message: Measure) -> Measured: ...

    def time_layers(self, message: TimeLayers, check: Callable[[], None]) -> LayersTimed:
        """`check` is called before every pass and raises when it shall end."""
        ...


def versions() -> dict[str, str]:
    """Library versions by name, Python's among them."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a board's own build may come without metadata
            found[library] = "unknown"
    return found
