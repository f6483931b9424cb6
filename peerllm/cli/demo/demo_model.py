"""The demo's model: a real one, had from wherever it can be, else the built-in one and the reason."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

from peerllm.builtin import BUILTIN, MODEL_DIR
from peerllm.cli.progress import ProgressBars, as_model
from peerllm.daemon.deployment.model_files import Tell, looked_up, resolve
from peerllm.errors import PeerLLMError
from peerllm.planner.cost.byte_sizes import human_bytes

FIRST = "smollm2"
QUESTION, ITS_OWN_QUESTION = "What is the capital of France?", "What are you?"  # the built-in model knows no capitals


@dataclass(frozen=True, slots=True)
class DemoModel:
    """`name` is what `peerllm run` is told; `instead` says why it is not the usual one."""

    name: str
    directory: Path
    instead: str = ""

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded: so small a model says something else after rounding, and is fast without."""
        return self.name == FIRST

    @property
    def question(self) -> str:
        return ITS_OWN_QUESTION if self.name == BUILTIN else QUESTION


def demo_model(asked: str | None, cache: Path, quiet: bool) -> DemoModel:
    """The model that was asked for, on this disk; without one FIRST, or the built-in model where that cannot be had.

    `cache` is the source's, for what GGUF files become.
    """
    if asked == BUILTIN:
        return DemoModel(BUILTIN, MODEL_DIR)
    name = as_model(asked or FIRST)
    with contextlib.closing(ProgressBars()) as bars:

        def tell(message: str, share: float | None) -> None:
            if not quiet:
                bars.show("", message, {} if share is None else {name: share})

        try:
            return DemoModel(name, asyncio.run(_had(name, cache, tell)))
        except PeerLLMError as error:
            if asked:
                raise
            return DemoModel(BUILTIN, MODEL_DIR, f"{FIRST} cannot be had: {error}")


async def _had(model: str, cache: Path, tell: Tell) -> Path:
    """Its directory, once all of it is on this disk."""
    tell(f"Looking for {model}.", None)
    async with looked_up(model, cache, tell) as found:
        if not found.missing_bytes:
            return found.directory
    what = f"downloading {model} from the Hugging Face hub, {human_bytes(found.missing_bytes)}"
    tell(f"{what}: 0%", 0.0)
    return await resolve(model, cache, lambda share: tell(f"{what}: {share:.0%}", share), found.missing_bytes)
