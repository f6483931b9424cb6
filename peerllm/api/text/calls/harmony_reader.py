"""Answers in gpt-oss's harmony form: messages, each in a channel that says what it is."""

from __future__ import annotations

import re

from peerllm.api.text.calls.answer_parts import AnswerPart, CallName, CallText, Words, joined
from peerllm.api.text.stops import overlap

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
HARMONY_MARKS = (START, CHANNEL, MESSAGE, "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
MAX_HEAD_CHARS = 1024
_TO = re.compile(r"\bto=(?:functions\.)?([\w.\-]{1,256})")
_BEGINNINGS = (START, CHANNEL, MESSAGE, " to=", "to=", "assistant")


class HarmonyReader:
    """An AnswerReader: what is analysed is thought, what goes to a function is a call, the rest is said.

    `calls`: tools are offered. The answer's first head has begun in the prompt. `one`: it stops behind the first call.
    """

    done = False

    def __init__(self, calls: bool, one: bool = False) -> None:
        self._calls, self._one = calls, one
        self._held = ""
        self._state = "head"
        self._kind = "said"
        self._empty = False  # a call has no arguments so far
        self.stopped = False

    @property
    def held(self) -> int:
        return len(self._held)

    def push(self, text: str) -> list[AnswerPart]:
        self._held += text
        return self._read(False)

    def flush(self) -> list[AnswerPart]:
        return self._read(True)

    def _read(self, last: bool) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        while not self.stopped and (self._head(parts, last) if self._state == "head" else self._body(parts, last)):
            pass
        return joined(parts)

    def _head(self, parts: list[AnswerPart], last: bool) -> bool:
        at = self._held.find(MESSAGE, 0, MAX_HEAD_CHARS)
        head = self._held[: at if at >= 0 else None]
        possible = any(head.startswith(one) or one.startswith(head) for one in _BEGINNINGS)
        if at < 0 and possible and len(head) < MAX_HEAD_CHARS and not last:
            return False
        if not possible or len(head) >= MAX_HEAD_CHARS or (at < 0 and not head.startswith((START, CHANNEL))):
            self._kind, self._state = "said", "body"  # no harmony: all of it is said
            return True
        if at < 0:  # cut within a head, which is no text
            self._held = ""
            return False
        to = _TO.search(head)
        channel = head.partition(CHANNEL)[2].split(None, 1)[:1]
        if to is not None and self._calls:
            self._kind, self._empty = "call", True
            parts.append(CallName(to[1]))
        else:
            self._kind = "thought" if channel and channel[0].startswith("analysis") else "said"
        self._held, self._state = self._held[at + len(MESSAGE) :], "body"
        return True

    def _body(self, parts: list[AnswerPart], last: bool) -> bool:
        found = [(at, mark) for mark in ENDS if (at := self._held.find(mark)) >= 0]
        at, mark = min(found) if found else (len(self._held), "")
        if not found and not last:
            at -= max(overlap(self._held, one) for one in ENDS)
        text = self._held[:at]
        self._held = self._held[at + len(mark) :]
        if self._kind == "call":
            self._empty = self._empty and not text
            over = bool(mark) or (last and not self._held)
            parts.append(CallText("{}" if self._empty and over else text))
            self._empty = self._empty and not over
        else:
            parts.append(Words(text, self._kind == "thought"))
        if not mark:
            return False
        self._state = "head"
        self.stopped = self._one and self._kind == "call"
        return bool(self._held) or last
