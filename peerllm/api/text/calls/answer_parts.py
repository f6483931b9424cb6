"""What a growing answer consists of: words, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

Schemas = Mapping[str, Mapping[str, Any]]  # of the arguments of each tool that is offered, by its name


class ToldToken(Struct, frozen=True, array_like=True):
    """A token of an answer's words, and those that were likeliest in its place: bytes, and log probability.

    `offset`: characters of words before it.
    """

    data: bytes
    logprob: float
    offset: int
    likeliest: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """`thought`: what the model thinks before it answers. `tokens`: where they were asked for, of what is said."""

    text: str
    thought: bool = False
    tokens: tuple[ToldToken, ...] = ()


@dataclass(frozen=True, slots=True)
class CallName:
    """A call of this tool begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments of the call that began last: a piece of a JSON object."""

    text: str


AnswerPart = Words | CallName | CallText


class AnswerReader(Protocol):
    """Reads a text that arrives in pieces of any size; what comes out, joined, does not depend on the pieces."""

    @property
    def done(self) -> bool:
        """Whether all that comes are words of the answer."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether what comes is of no use."""
        ...

    @property
    def held(self) -> int:
        """How many characters at the end of the text are not out, and may yet come out."""
        ...

    def push(self, text: str) -> list[AnswerPart]:
        """What is certain now."""
        ...

    def flush(self) -> list[AnswerPart]:
        """The rest: no more text comes."""
        ...


def joined(parts: Iterable[AnswerPart]) -> list[AnswerPart]:
    """Neighbours of a kind as one, what is empty left out."""
    found: list[AnswerPart] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Words):
            if isinstance(last, Words) and last.thought == part.thought:
                found[-1] = Words(last.text + part.text, part.thought, last.tokens + part.tokens)
            elif part.text:
                found.append(part)
        elif isinstance(part, CallText) and isinstance(last, CallText):
            found[-1] = CallText(last.text + part.text)
        elif isinstance(part, CallName) or part.text:
            found.append(part)
    return found
