"""Calls that are not written as JSON: `name(key="value")` as in Python, `call:name{key:value}` as Gemma writes them."""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_DEPTH = 32  # of lists and objects within each other
_NAME = re.compile(r"[\w.\-]{1,256}")
_SPACE = re.compile(r"\s*")
_BARE = re.compile(r"[^,{}()\[\]]*")
_KEY = re.compile(r"[^\s:=,{}()\[\]'\"]{1,256}")
_WORDS = {"True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class LooseCall:
    """Reads one text; ValueError where it is no call. `quote`: what stands around strings besides quotation marks."""

    def __init__(self, text: str, quote: str = "") -> None:
        self._text, self._quote, self._at = text, quote, 0

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """All calls in the text, separated by commas or space, in brackets or not; nothing else may stand there."""
        found = []
        listed = self._took("[")
        while not self._over() and not (listed and self._took("]")):
            found.append(self._call())
            self._took(",")
            self._took(";")
        if not found or not self._over():
            raise ValueError("no call")
        return found

    def _call(self) -> tuple[str, dict[str, Any]]:
        self._took("call:")
        name = _NAME.match(self._text, self._at)
        if name is None:
            raise ValueError("no name")
        self._at = name.end()
        for opening, closing, sign in (("(", ")", "="), ("{", "}", ":")):
            if self._took(opening):
                return name[0], self._pairs(closing, sign, 1)
        raise ValueError("no arguments")

    def _pairs(self, closing: str, sign: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._took(closing):
            if found and not self._took(","):
                raise ValueError("no comma")
            if self._took(closing):
                break
            key = self._string()
            if key is None:
                self._skip()
                bare = _KEY.match(self._text, self._at)
                if bare is None:
                    raise ValueError("no key")
                key, self._at = bare[0], bare.end()
            if not self._took(sign):
                raise ValueError("no value")
            found[key] = self._value(depth)
        return found

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        if (text := self._string()) is not None:
            return text
        if self._took("{"):
            return self._pairs("}", ":", depth + 1)
        if self._took("["):
            items: list[Any] = []
            while not self._took("]"):
                if items and not self._took(","):
                    raise ValueError("no comma")
                if self._took("]"):
                    break
                items.append(self._value(depth + 1))
            return items
        bare = _BARE.match(self._text, self._at)
        assert bare is not None
        self._at, word = bare.end(), bare[0].strip()
        if not word:
            raise ValueError("no value")
        try:
            return _WORDS[word] if word in _WORDS else msgspec.json.decode(word)
        except msgspec.MsgspecError:
            return word

    def _string(self) -> str | None:
        self._skip()
        if self._quote and self._text.startswith(self._quote, self._at):
            begin = self._at + len(self._quote)
            end = self._text.find(self._quote, begin)
            if end < 0:
                raise ValueError("no end")
            self._at = end + len(self._quote)
            return self._text[begin:end]
        mark = self._text[self._at : self._at + 1]
        if mark not in ("'", '"'):
            return None
        begin = at = self._at + 1
        while at < len(self._text) and self._text[at] != mark:
            at += 2 if self._text[at] == "\\" else 1
        if at >= len(self._text):
            raise ValueError("no end")
        self._at = at + 1
        return _unescaped(self._text[begin:at])

    def _took(self, sign: str) -> bool:
        self._skip()
        if self._text.startswith(sign, self._at):
            self._at += len(sign)
            return True
        return False

    def _skip(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()

    def _over(self) -> bool:
        self._skip()
        return self._at >= len(self._text)


def _unescaped(text: str) -> str:
    """As JSON means it; a backslash before any other sign is left out."""

    def meant(found: re.Match[str]) -> str:
        sign = found[1]
        return chr(int(sign[1:], 16)) if len(sign) > 1 else _ESCAPES.get(sign, sign)

    text = _ESCAPE.sub(meant, text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # pairs of surrogates are one character
