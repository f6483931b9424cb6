"""The texts of the models in use: prompts are prepared beside the loop, never in it.

They are prepared in child processes with limits; where those are not welcome (`--in-process`) in threads, with bounds
on the size of a prompt alone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import Tokenizer

from peerllm.api.error_answers import FieldError
from peerllm.api.text.detokenizer import Detokenizer, special_ids
from peerllm.api.text.model_text import PromptLengthError
from peerllm.api.text.template import Message
from peerllm.api.text.text_child import TextWork
from peerllm.api.text.text_process import TextProcess
from peerllm.errors import BadInputError, ModelError, OverloadedError
from peerllm.types import DeploymentId

MAX_MODELS = 4  # decoders kept in memory; a large vocabulary takes some 50 MB
MAX_WAITING = 512  # prompts being prepared or waiting for that: all that may be streamed could ask at once
LARGE_CHARS = 64 << 10  # prompts larger than this have a process of their own, so that small ones do not wait for them
IDLE_S, LARGE_IDLE_S = 300.0, 30.0  # seconds after which a process that nobody asks is ended
MOST_BYTES_IN_PROCESS = 128 << 10  # of a prompt that is encoded in the daemon, which stands still meanwhile: < 0.5 s
_ERRORS: Mapping[str, type[BadInputError]] = {"ModelError": ModelError}


@dataclass(frozen=True, slots=True)
class AnswerText:
    """What an answer's text needs of a model; `defaults` are its makers' sampling parameters."""

    model_dir: Path
    decoder: Tokenizer  # knows no merges: it only decodes
    special: frozenset[int]
    defaults: Mapping[str, float]

    def detokenizer(self, silent: frozenset[int]) -> Detokenizer:
        """For one answer; ids in `silent` have no text, nor have the special ones."""
        return Detokenizer(self.decoder, silent | self.special)


class TextStore:
    """Owned by the API; `close` ends its processes and threads."""

    def __init__(self, in_process: bool = False) -> None:
        self._texts: OrderedDict[DeploymentId, AnswerText] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="api-text")
        self._work = TextWork() if in_process else None
        self._small, self._large = TextProcess(IDLE_S), TextProcess(LARGE_IDLE_S)
        self._waiting = 0
        self._turns: WeakValueDictionary[tuple[str, bool], asyncio.Lock] = (
            WeakValueDictionary()
        )  # by who asks, and size

    async def model(self, deployment: DeploymentId, model_dir: Path) -> AnswerText:
        """The text of a deployment's model, read once."""
        if deployment not in self._texts:
            async with self._one_at_a_time:
                if deployment not in self._texts:
                    told = await self._ask({"model_dir": str(model_dir)}, 0)
                    self._texts[deployment] = await self._in_thread(_answer_text, model_dir, told)
            while len(self._texts) > MAX_MODELS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(deployment)
        return self._texts[deployment]

    async def prompt(self, text: AnswerText, messages: Sequence[Message], context: int, asker: str = "") -> list[int]:
        """The prompt's token ids; FieldError if it and one token of an answer do not fit the context.

        Small and large prompts of an asker are prepared one after the other, so that others wait for one at most.
        """
        if self._waiting >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} prompts are being prepared already; ask again in a moment", 1.0)
        self._waiting += 1
        try:
            size = sum(len(str(message["content"])) for message in messages)
            question = {"model_dir": str(text.model_dir), "messages": list(messages), "context": context}
            async with self._turns.setdefault((asker, size > LARGE_CHARS), asyncio.Lock()):
                ids: list[int] = (await self._ask(question, size))["ids"]
            return ids
        finally:
            self._waiting -= 1

    async def _ask(self, question: dict[str, Any], size: int) -> dict[str, Any]:
        asked: Awaitable[dict[str, Any]]
        if self._work is not None:
            asked = self._in_thread(self._work.answer, {**question, "most_bytes": MOST_BYTES_IN_PROCESS})
        else:
            asked = (self._large if size > LARGE_CHARS else self._small).ask(question)
        answer = await asked
        if error := answer.get("error"):
            if error == PromptLengthError.__name__:
                raise FieldError(answer["message"], "messages", "context_length_exceeded")
            raise _ERRORS.get(error, BadInputError)(answer["message"])
        return answer

    async def _in_thread(self, work: Any, *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def close(self) -> None:
        """May be called twice."""
        await asyncio.gather(self._small.close(), self._large.close())
        self._threads.shutdown(wait=False, cancel_futures=True)


def _answer_text(model_dir: Path, told: Mapping[str, Any]) -> AnswerText:
    decoder = Tokenizer.from_str(told["decoder"])
    return AnswerText(model_dir, decoder, special_ids(decoder), told["defaults"])
