"""The process in which foreign templates and tokenizers run: it answers one question after another, within limits.

Standard input and output carry messages: four bytes of length, then JSON. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import msgspec
import orjson

from peerllm.api.text.model_text import ModelText
from peerllm.errors import BadInputError, PeerLLMError

MAX_MESSAGE_BYTES = 160 << 20  # a tokenizer's file within JSON
MAX_MODELS = 2  # texts kept in memory
LENGTH_BYTES = 4
_WORST_FIRST = "1000"  # which process the kernel ends where memory runs out


class TextWork:
    """The questions that there are; a text is read when it is first asked for."""

    def __init__(self, memory_bytes: int = 0) -> None:
        self._memory_bytes = memory_bytes  # that the process may hold; 0: as much as there is
        self._models: OrderedDict[str, ModelText] = OrderedDict()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What was asked for, or the error's name and words; no question ends the process."""
        try:
            text = self._model(question["model_dir"])
            if "prompt" in question:
                options = (
                    question["context"],
                    question.get("most_bytes"),
                    question.get("reasoning"),
                    question.get("tools", ()),
                    question.get("after", ()),
                )
                return {"ids": text.prompt(question["prompt"], *options)}
            if "form" in question:
                form, calls = json.loads(question["form"])
                return {"grammar": text.grammar(form, calls, question["opened"])}
            if "tokens" in question:
                return {"tokens": text.tokens(question["tokens"])}
            return {
                "table": text.table(),
                "defaults": text.defaults,
                "marks": text.marks,
                "form": text.form.name if text.form is not None else None,
                "fill_in": text.fill_in,
                "template": text.template,
            }
        except PeerLLMError as error:
            return {"error": type(error).__name__, "message": str(error)}
        except MemoryError:
            self._models.clear()
            return {"error": BadInputError.__name__, "message": too_much(question, memory_text(self._memory_bytes))}

    def _model(self, model_dir: str) -> ModelText:
        if model_dir not in self._models:
            self._models[model_dir] = ModelText(Path(model_dir))
            while len(self._models) > MAX_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(model_dir)
        return self._models[model_dir]


def memory_text(nbytes: int) -> str:
    return f"more than {nbytes >> 20} MiB of memory" if nbytes else "more memory than there is"


def too_much(question: dict[str, Any], what: str) -> str:
    """Why a question that took too much was not answered."""
    if "form" in question:
        return f"reading the answer's form takes {what}; ask for a simpler one"
    if "prompt" in question:
        return f"preparing this prompt takes {what}; shorten it"
    return f"reading the tokenizer in {Path(question['model_dir']).name!r} takes {what}"


def read(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None at the end."""
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    found: dict[str, Any] = orjson.loads(stream.read(int.from_bytes(head, "big")))
    return found


def framed(message: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(message)  # whole numbers of any size, which orjson refuses
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def _limit(memory_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # systems without limits, or with stricter ones
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a prompt is nobody's business
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_WORST_FIRST, encoding="ascii")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the daemon, which closes the pipe
    memory_bytes = int(sys.argv[1])
    _limit(memory_bytes)
    work, out = TextWork(memory_bytes), sys.stdout.buffer
    while (question := read(sys.stdin.buffer)) is not None:
        out.write(framed(work.answer(question)))
        out.flush()


if __name__ == "__main__":
    main()
