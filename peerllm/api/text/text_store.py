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

import msgspec
from msgspec import Struct

from peerllm.api.error_answers import FieldError
from peerllm.api.text.calls.answer_parts import AnswerReader, Schemas
from peerllm.api.text.calls.call_forms import FORMS, CallForm
from peerllm.api.text.calls.call_patterns import ToolSchemaError
from peerllm.api.text.calls.call_reader import CallReader
from peerllm.api.text.calls.harmony_reader import HarmonyReader
from peerllm.api.text.calls.thinking_reader import ThinkingReader
from peerllm.api.text.detokenizer import Detokenizer, special_ids
from peerllm.api.text.model_text import PromptLengthError
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.api.text.template import Message
from peerllm.api.text.text_child import TextWork
from peerllm.api.text.text_process import TextProcess
from peerllm.api.text.tokens.decoding_table import DecodingTable
from peerllm.chat_templates import Marks
from peerllm.engine.messages import Constraint
from peerllm.errors import BadInputError, ModelError, OverloadedError
from peerllm.types import DeploymentId

MAX_MODELS = 4  # whose tokens are kept in memory; a large vocabulary takes some 20 MB
MAX_WAITING = 512  # prompts being prepared or waiting for that: all that may be streamed could ask at once
LARGE_CHARS = 64 << 10  # prompts larger than this have a process of their own, so that small ones do not wait for them
IDLE_S, LARGE_IDLE_S = 300.0, 30.0  # seconds after which a process that nobody asks is ended
MOST_BYTES_IN_PROCESS = 128 << 10  # of a prompt that is encoded in the daemon, which stands still meanwhile: < 0.5 s
_TAIL = 16  # of a prompt's ids: in these a mark at its end is seen, and space behind it
_ERRORS: Mapping[str, type[BadInputError]] = {"ModelError": ModelError}


@dataclass(frozen=True, slots=True)
class AnswerText:
    """What an answer's text needs of a model; `defaults` are its makers' sampling parameters."""

    model_dir: Path
    decoder: DecodingTable
    special: frozenset[int]
    defaults: Mapping[str, float]
    marks: Marks | None = None  # around what the model thinks; None: it does not, or not between marks
    form: CallForm | None = None  # in which it calls tools; None: it has no chat template
    fill_in: str = ""  # see fill_in_form
    template: str = ""  # for chats

    def knows(self, token_id: int) -> bool:
        """Whether the model has such a token."""
        return 0 <= token_id < self.decoder.vocabulary

    @property
    def chats(self) -> bool:
        return self.form is not None

    def opened(self, chat: Sequence[int]) -> bool:
        """Whether a prompt ends where the model begins to think."""
        if self.marks is None:
            return False
        end = self.decoder.decode(list(chat[-_TAIL:]), skip_special_tokens=False)
        return bool(end.rstrip().endswith(self.marks[0].rstrip()))

    def constraint(self, grammar: str) -> Constraint | None:
        """What the engine needs of a grammar of `TextStore.grammar`; "": no grammar."""
        return Constraint(grammar, str(self.model_dir / "tokenizer.json")) if grammar else None

    @property
    def thinks(self) -> bool:
        return self.marks is not None or self.form is FORMS["harmony"]

    def reader(
        self, chat: Sequence[int] | None, schemas: Schemas, one_call: bool = False, kept: bool = False
    ) -> AnswerReader:
        """For one answer to this prompt, with these tools; None: to a text, whose continuation is not divided.

        `kept`: masks keep the calls.
        """
        if chat is None or self.form is None:
            return ThinkingReader(ReasoningSplitter(None, False))
        if self.form is FORMS["harmony"]:
            return HarmonyReader(bool(schemas), one_call)
        calls = CallReader(self.form.kept if kept else self.form, schemas, one_call) if schemas else None
        if self.marks is None:
            return ThinkingReader(ReasoningSplitter(None, False), calls)
        return ThinkingReader(ReasoningSplitter(self.marks, self.opened(chat)), calls)

    def detokenizer(self, silent: frozenset[int], chat: bool = False, tools: bool = False) -> Detokenizer:
        """For one answer; ids in `silent` have no text, nor have special ones, but marks that a reader looks for."""
        shown: set[str] = set()
        if chat and self.form is not None and (tools or self.form is FORMS["harmony"]):
            shown |= self.form.tokens
        added = self.decoder.get_added_tokens_decoder().items() if chat else ()
        marks = frozenset(
            number
            for number, token in added
            if token.content in shown or (chat and any(token.content in mark for mark in self.marks or ()))
        )
        return Detokenizer(self.decoder, silent | (self.special - marks), marks - silent)


class TextStore:
    """Owned by the API; `close` ends its processes and threads."""

    def __init__(self, in_process: bool = False) -> None:
        self._texts: OrderedDict[DeploymentId, AnswerText] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="api-text")
        self._work = TextWork() if in_process else None
        self._small, self._large = TextProcess(IDLE_S), TextProcess(LARGE_IDLE_S)
        self._waiting = 0
        self._turns = WeakValueDictionary[tuple[str, bool], asyncio.Lock]()  # by who asks, and size

    async def model(self, deployment: DeploymentId, model_dir: Path) -> AnswerText:
        """The text of a deployment's model, read once."""
        if deployment not in self._texts:
            async with self._one_at_a_time:
                if deployment not in self._texts:
                    told = await self._ask({"model_dir": str(model_dir)}, 0)
                    tokens: list[str | None] = []
                    while len(tokens) < told["table"]["ids"]:
                        question = {"model_dir": str(model_dir), "tokens": len(tokens)}
                        tokens += (await self._ask(question, 0))["tokens"]
                    self._texts[deployment] = _answer_text(model_dir, told, tokens)
            while len(self._texts) > MAX_MODELS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(deployment)
        return self._texts[deployment]

    async def prompt(
        self,
        text: AnswerText,
        said: Sequence[Message] | str,
        context: int,
        asker: str = "",
        reasoning: bool | str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        after: Sequence[int] = (),
    ) -> list[int]:
        """The token ids of a chat, or of a text that is to be continued.

        `reasoning` as in Generation, `tools` as templates expect them. `after`: ids that they follow.

        FieldError if they and one token of an answer do not fit the context. Small and large prompts of an asker are
        prepared one after the other, so that others wait for one at most.
        """
        if self._waiting >= MAX_WAITING:
            raise OverloadedError(f"{MAX_WAITING} prompts are being prepared already; ask again in a moment", 1.0)
        self._waiting += 1
        try:
            parts = [(one["content"], one.get("tool_calls", "")) for one in said if not isinstance(one, str)]
            size = len(said) if isinstance(said, str) else sum(len(str(part)) for pair in parts for part in pair)
            size += sum(len(str(tool)) for tool in tools)
            question: dict[str, Any] = {"model_dir": str(text.model_dir), "prompt": said, "context": context}
            question |= {"reasoning": reasoning, "tools": tools, "after": after}
            async with self._turns.setdefault((asker, size > LARGE_CHARS), asyncio.Lock()):
                ids: list[int] = (await self._ask(question, size))["ids"]
            return ids
        finally:
            self._waiting -= 1

    async def grammar(self, text: AnswerText, form: Struct | None, calls: Struct, opened: bool) -> str:
        """What keeps an answer in its form (generation.AnswerForm), and calls to theirs (generation.CallsWanted);
        FieldError with the reason if nothing can.
        """
        data = msgspec.json.encode((form, calls)).decode()
        question = {"model_dir": str(text.model_dir), "form": data, "opened": opened}
        answer: str = (await self._ask(question, len(data)))["grammar"]
        return answer

    async def _ask(self, question: dict[str, Any], size: int) -> dict[str, Any]:
        asked: Awaitable[dict[str, Any]]
        if self._work is not None:
            asked = self._in_thread(self._work.answer, {**question, "most_bytes": MOST_BYTES_IN_PROCESS})
        else:
            asked = (self._large if size > LARGE_CHARS else self._small).ask(question)
        answer = await asked
        if error := answer.get("error"):
            if error == PromptLengthError.__name__:
                name = "prompt" if isinstance(question["prompt"], str) else "messages"
                raise FieldError(answer["message"], name, "context_length_exceeded")
            if error == ToolSchemaError.__name__:
                raise FieldError(answer["message"], "tools", "invalid_schema")
            if "form" in question:
                raise FieldError(answer["message"], "response_format", "invalid_schema")
            raise _ERRORS.get(error, BadInputError)(answer["message"])
        return answer

    async def _in_thread(self, work: Any, *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def close(self) -> None:
        """May be called twice."""
        await asyncio.gather(self._small.close(), self._large.close())
        self._threads.shutdown(wait=False, cancel_futures=True)


def _answer_text(model_dir: Path, told: Mapping[str, Any], tokens: Sequence[str | None]) -> AnswerText:
    decoder, told_marks = DecodingTable(told["table"], tokens), told.get("marks")
    marks = (str(told_marks[0]), str(told_marks[1])) if told_marks else None
    form, more = FORMS.get(told.get("form") or ""), (told.get("fill_in", ""), told.get("template", ""))
    return AnswerText(model_dir, decoder, special_ids(decoder), told["defaults"], marks, form, *more)
