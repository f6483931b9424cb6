"""What every client is asked, and what it says, whatever it calls these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

MODEL, PARROT = "builtin", "parrot"  # the built-in model, and the scripted one
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of the next days",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}


@dataclass(frozen=True)
class Question:
    """`messages` as OpenAI has them, but that arguments are an object; `form` is a schema, or "json"."""

    messages: tuple[dict[str, Any], ...]
    model: str = MODEL
    stream: bool = False
    tools: tuple[dict[str, Any], ...] = ()
    max_tokens: int = 60
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    form: Any = None
    think: bool | None = None
    must_call: bool = False
    chances: bool = False  # how likely each token was

    def but(self, **other: Any) -> Question:
        return replace(self, **other)


def say(*texts: str, **options: Any) -> Question:
    """A conversation that the user begins and ends."""
    roles = ("user", "assistant")
    return Question(tuple({"role": roles[place % 2], "content": text} for place, text in enumerate(texts)), **options)


@dataclass
class Said:
    """`finish` in OpenAI's words; `pieces` of text, `argument_pieces` of the calls; None: the client does not tell."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    pieces: int = 0
    argument_pieces: int = 0
    chances: list[float] = field(default_factory=list)  # logarithms


class Client:
    """One tool that homes use, with the address and the key that it was given, as it sends its requests.

    `cells`: what it can do, by the names in the matrix. `failing`: its own exceptions, by the cell.
    """

    name: ClassVar[str]
    cells: ClassVar[frozenset[str]]
    failing: ClassVar[dict[str, str]] = {}  # the names of classes
    shows_thought: ClassVar[bool] = True
    wrong: ClassVar[Question] = say("Hello.", temperature=1000.0)  # has a field that nobody takes

    def __init__(self, url: str, key: str, folder: Path, repeat_key: str = "") -> None:
        """`folder` is its own; `repeat_key`: sent as Idempotency-Key."""
        self.url, self.key, self.folder, self.repeat_key = url, key, folder, repeat_key

    @property
    def repeating(self) -> dict[str, str]:
        return {"Idempotency-Key": self.repeat_key} if self.repeat_key else {}

    def models(self) -> list[str]:
        raise NotImplementedError

    def ask(self, question: Question) -> Said:
        raise NotImplementedError

    def hang_up(self, question: Question) -> None:
        """Stream the answer, and close it at the first piece."""
        raise NotImplementedError

    def vectors(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def continued(self, text: str) -> str:
        """What the model writes behind it, greedily, 12 tokens."""
        raise NotImplementedError

    def responded(self, text: str, stream: bool) -> str:
        """What is said to it through OpenAI's Responses, greedily."""
        raise NotImplementedError

    def set_up(self) -> None:
        """What the tool asks when it is set up, and then every now and then."""
        raise NotImplementedError

    def staying(self) -> Iterator[tuple[Any, float]]:
        """Asks in each of its ways of saying how long a model stays: what it said, and how many seconds that is."""
        raise NotImplementedError

    def stays_s(self) -> float:
        """How long that model stays loaded, as it is told; 0: it is not."""
        raise NotImplementedError


EVERY = ("list of models", "whole answer", "streamed answer", "system message", "several turns", "stop strings",
         "cut by a limit", "usage", "call of a tool", "calls in parallel", "result of a tool",
         "arguments in pieces", "JSON object", "JSON schema", "text continued", "vectors", "thought apart",
         "thinking off", "tool that must be called", "log probabilities", "Responses",
         "unknown model", "wrong key", "wrong field", "hanging up", "asked twice", "set-up",
         "how long it stays")  # fmt: skip
