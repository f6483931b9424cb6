"""Divides an answer into words and calls that stand behind marks."""

from __future__ import annotations

from peerllm.api.text.calls.answer_parts import AnswerPart, CallName, Schemas, Words, joined
from peerllm.api.text.calls.call_bodies import CallBody, JsonBody
from peerllm.api.text.calls.call_forms import CallForm
from peerllm.api.text.stops import overlap

_BETWEEN = " \t\r\n;"  # between calls without marks
MAX_BLANK_CHARS = 1024  # of it: all is looked at with each piece, and some models write space without end


class CallReader:
    """An AnswerReader. What only looked like a call comes out as words; space around calls is left out.

    `one`: it stops with the end of the first call.
    """

    done = False

    def __init__(self, form: CallForm, schemas: Schemas, one: bool = False) -> None:
        self._form, self._schemas, self._one = form, schemas, one
        self._held = ""
        self._state = "bare" if form.bare else "words"
        self._mark = self._close = ""
        self._body: CallBody = JsonBody()
        self._blank = ""  # space that is left out if a call comes next
        self._trim = False  # space that comes next is left out
        self.stopped = False

    @property
    def held(self) -> int:
        return len(self._held)

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        return self._read(False)

    def flush(self) -> list[AnswerPart]:
        parts = self._read(True)
        if self._blank:
            parts.append(Words(self._blank))
            self._blank = ""
        return joined(parts)

    def _read(self, last: bool) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        step = {"bare": self._bare, "words": self._words, "call": self._call, "close": self._closing}
        while not self.stopped and step[self._state](parts, last):
            pass
        return joined(parts)

    def _bare(self, parts: list[AnswerPart], last: bool) -> bool:
        """Where a call may stand without a mark: at the start, and behind another one."""
        begun = self._held.lstrip(_BETWEEN)
        possible = len(self._held) - len(begun) <= MAX_BLANK_CHARS
        if not begun and not last and possible:
            return False
        if begun.startswith("{") and possible:
            self._mark, self._close = self._held[: len(self._held) - len(begun)], ""
            self._held, self._body, self._state = begun, JsonBody(self._schemas), "call"
        else:
            self._state = "words"
        return True

    def _words(self, parts: list[AnswerPart], last: bool) -> bool:
        found = [(at, mark) for mark in self._form.marks if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            self._say(parts, self._held[:at])
            self._mark, self._close, self._state = mark, self._form.marks[mark], "call"
            self._held, self._body = self._held[at + len(mark) :], self._form.body(mark, self._schemas, self._one)
            return True
        keep = 0 if last else max((overlap(self._held, mark) for mark in self._form.marks), default=0)
        self._say(parts, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _call(self, parts: list[AnswerPart], last: bool) -> bool:
        taken = self._body.take(self._held, last)
        if taken.state == "no call":
            self._say(parts, "" if self._form.hidden else self._mark)
            self._state = "words"
            return True
        if any(isinstance(part, CallName) for part in taken.parts):
            self._blank = ""
        parts.extend(taken.parts)
        self._held = self._held[taken.chars :]
        if taken.state != "more" or (last and not taken.chars):
            self._state, self._trim = "close", True
            return True
        return bool(taken.chars)

    def _closing(self, parts: list[AnswerPart], last: bool) -> bool:
        if self._one:
            self.stopped = True
            return False
        begun = self._held.lstrip()
        if not last and self._close.startswith(begun) and begun != self._close:
            return False
        if self._close and begun.startswith(self._close):
            self._held = begun[len(self._close) :]
        self._state = "bare" if self._form.bare and not self._close else "words"
        return True

    def _say(self, parts: list[AnswerPart], text: str) -> None:
        if self._trim:
            text = text.lstrip(_BETWEEN if self._form.bare else None)
            self._trim = not text
        text = self._blank + text
        said = text.rstrip()
        self._blank = text[len(said) :]
        parts.append(Words(said))
