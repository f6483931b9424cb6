"""The texts of the models in use, loaded and used in worker threads so that the loop never waits for a tokenizer."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from peerllm.api.text.model_text import ModelText
from peerllm.api.text.template import Message
from peerllm.errors import OverloadedError
from peerllm.types import DeploymentId

T = TypeVar("T")
MAX_MODELS = 4  # texts kept in memory; a large vocabulary takes some 50 MB
WORKERS = 2  # threads
MAX_WAITING = 512  # prompts being prepared or waiting for a thread: all that may be streamed could ask at once


class TextStore:
    """Owned by the API; `close` ends its threads."""

    def __init__(self) -> None:
        self._models: OrderedDict[DeploymentId, ModelText] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="api-text")
        self._waiting = 0

    async def model(self, deployment: DeploymentId, model_dir: Path) -> ModelText:
        """The text of a deployment's model, read once."""
        if deployment not in self._models:
            async with self._one_at_a_time:
                if deployment not in self._models:
                    self._models[deployment] = await self._in_thread(lambda: ModelText(model_dir))
            while len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(deployment)
        return self._models[deployment]

    async def prompt(self, text: ModelText, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids."""
        return await self._in_thread(lambda: text.prompt(messages))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._waiting >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} prompts are being prepared already; ask again in a moment", 1.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
