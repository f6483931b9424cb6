"""What stands behind a mark that begins a call, read as it comes.

A body is shown all text from the mark on that it has not taken yet, again with each piece. Nothing is taken before
it is certain that a call begins, so what only looked like one can still come out as words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec

from peerllm.api.text.calls.answer_parts import AnswerPart, CallName, CallText
from peerllm.api.text.calls.json_end import JsonEnd
from peerllm.api.text.calls.loose_call import LooseCall

NAME_KEYS, ARGUMENT_KEYS = ("name", "function"), ("arguments", "parameters")
MAX_HEAD_CHARS = 512  # of a name and what may stand around it
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.){1,256}")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NAMED = re.compile(r"\s{0,8}([\w.\-]{1,256})(?:\[CALL_ID\]\w{1,64})?\[ARGS\]\s{0,8}(?=\{)")
_MAYBE_NAMED = re.compile(r"[\w.\-\[\]\s]*")

Known = Collection[str] | None  # the names that a call may have; None: any
ReadCalls = Callable[[str], list[tuple[str, dict[str, Any]]]]


@dataclass(frozen=True, slots=True)
class Taken:
    """What a body makes of the text: the parts, how many characters they take, and whether the call is over."""

    parts: tuple[AnswerPart, ...] = ()
    chars: int = 0
    state: Literal["more", "done", "no call"] = "more"


NO_CALL = Taken(state="no call")


class CallBody(Protocol):
    def take(self, text: str, last: bool) -> Taken:
        """`last`: no more text comes."""
        ...


class ArgumentsText:
    """An object's text, passed on as it comes; `behind`: brackets that close after it."""

    def __init__(self, behind: int = 0) -> None:
        self._end, self._behind = JsonEnd(), behind
        self._rest: JsonEnd | None = None

    def take(self, text: str, last: bool) -> Taken:
        if self._rest is not None:
            return self._close(text, 0, ())
        at = self._end.find(text)
        if at is None:
            return Taken((CallText(text),), len(text))
        self._rest = JsonEnd(self._behind)
        return self._close(text, at, (CallText(text[:at]),))

    def _close(self, text: str, at: int, parts: tuple[AnswerPart, ...]) -> Taken:
        if not self._behind:
            return Taken(parts, at, "done")
        assert self._rest is not None
        end = self._rest.find(text[at:])
        return Taken(parts, len(text)) if end is None else Taken(parts, at + end, "done")


class JsonBody:
    """{"name": ..., "arguments": {...}}, also with "parameters"; streamed where the two come in this order."""

    def __init__(self, known: Known = None) -> None:
        self._known = known
        self._arguments: ArgumentsText | None = None
        self._whole, self._looked = JsonEnd(), 0

    def take(self, text: str, last: bool) -> Taken:
        if self._arguments is not None:
            return self._arguments.take(text, last)
        if text.lstrip()[:1] not in ("", "{"):
            return NO_CALL
        if (head := _HEAD.match(text)) is not None:
            name = _text(head[1])
            if not self._allowed(name):
                return NO_CALL
            self._arguments = ArgumentsText(behind=1)
            return Taken((CallName(name),), head.end())
        end = self._whole.find(text[self._looked :])
        if end is None:
            self._looked = len(text)
            return NO_CALL if last else Taken()
        call = called(text[: self._looked + end])
        if call is None or not self._allowed(call[0]):
            return NO_CALL
        return Taken((CallName(call[0]), CallText(call[1])), self._looked + end, "done")

    def _allowed(self, name: str) -> bool:
        return bool(name) and (self._known is None or name in self._known)


class ListBody:
    """[{"name": ...}, ...], or one such object alone, or Mistral's `name[ARGS]{...}`. `one`: the first is all."""

    def __init__(self, one: bool = False) -> None:
        self._one = one
        self._call: CallBody | None = None
        self._next: JsonBody | None = None  # of which it is not certain yet that it is one
        self._state: Literal["start", "listed", "between", "alone"] = "start"

    def take(self, text: str, last: bool) -> Taken:
        begun = text.lstrip()
        skipped = len(text) - len(begun)
        if self._state == "start":
            if not begun:
                return NO_CALL if last else Taken()
            if begun[0] not in "[{":
                return self._named(text, last)
            inner = begun[1:] if begun[0] == "[" else begun
            return self._begin(inner, len(text) - len(inner), last, "listed" if begun[0] == "[" else "alone")
        if self._state == "between":
            if not begun:
                return Taken(state="done") if last else Taken()
            if begun[0] == ",":
                return self._begin(begun[1:], skipped + 1, last, "listed")
            return Taken((), skipped + (begun[0] == "]"), "done")
        assert self._call is not None
        return self._then(self._call.take(text, last))

    def _begin(self, inner: str, skipped: int, last: bool, state: Literal["listed", "alone"]) -> Taken:
        self._next = self._next or JsonBody()
        taken = self._next.take(inner, last)
        if taken.state == "no call":
            return NO_CALL if self._state == "start" else Taken(state="done")
        if not taken.chars:
            return Taken()
        self._call, self._next, self._state = self._next, None, state
        return self._then(Taken(taken.parts, taken.chars + skipped, taken.state))

    def _then(self, taken: Taken) -> Taken:
        if taken.state == "done" and self._state == "listed" and not self._one:
            self._state = "between"
            return Taken(taken.parts, taken.chars)
        return taken

    def _named(self, text: str, last: bool) -> Taken:
        head = _NAMED.match(text)
        if head is not None:
            self._call, self._state = ArgumentsText(), "alone"
            return Taken((CallName(head[1]),), head.end())
        possible = not last and len(text) <= MAX_HEAD_CHARS and _MAYBE_NAMED.fullmatch(text)
        return Taken() if possible else NO_CALL


class WholeBody:
    """Everything up to the closing mark, which `read` turns into calls; ValueError: it is none.

    `closed`: there must be one. `one`: the first call is all.
    """

    def __init__(self, close: str, read: ReadCalls, closed: bool = False, one: bool = False) -> None:
        self._close, self._read, self._closed, self._one = close, read, closed, one
        self._looked = 0

    def take(self, text: str, last: bool) -> Taken:
        end = text.find(self._close, max(0, self._looked - len(self._close)))
        if end < 0:
            self._looked = len(text)
            if not last:
                return Taken()
            if self._closed:
                return NO_CALL
            end = len(text)
        try:
            calls = self._read(text[:end])
        except (ValueError, RecursionError):
            return NO_CALL
        parts = [
            (CallName(name), CallText(msgspec.json.encode(given).decode()))
            for name, given in calls[: 1 if self._one else None]
        ]
        return Taken(tuple(one for pair in parts for one in pair), end, "done")


class ChosenBody:
    """One body or another: `choose` says which once the text shows it, None until then."""

    def __init__(self, choose: Callable[[str], CallBody | None]) -> None:
        self._choose = choose
        self._body: CallBody | None = None

    def take(self, text: str, last: bool) -> Taken:
        if self._body is None:
            self._body = self._choose(text)
        if self._body is None:
            return NO_CALL if last else Taken()
        return self._body.take(text, last)


def loose(quote: str) -> ReadCalls:
    return lambda text: LooseCall(text, quote).calls()


def called(text: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a call that is one JSON object; None: it is none."""
    try:
        found: Any = msgspec.json.decode(text)
        if isinstance(found, dict) and isinstance(found.get("function"), dict):
            found = found["function"]
        if not isinstance(found, dict):
            return None
        name = next((found[key] for key in NAME_KEYS if key in found), None)
        given: Any = next((found[key] for key in ARGUMENT_KEYS if key in found), None)
        if isinstance(given, str):
            given = msgspec.json.decode(given or "{}")
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    if not isinstance(name, str) or not name or not isinstance(given, dict | None):
        return None
    return name, msgspec.json.encode(given or {}).decode()


def _text(quoted: str) -> str:
    try:
        return msgspec.json.decode(quoted, type=str)
    except msgspec.MsgspecError:
        return ""
