"""Calls whose arguments have tags of their own: `<function=f><parameter=a>1</parameter></function>`, and GLM's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from peerllm.api.text.calls.answer_parts import Schemas

FUNCTION, FUNCTION_END = "<function=", "</function>"
MAX_NAME_CHARS = 256


def tagged_calls(text: str, schemas: Schemas) -> list[tuple[str, dict[str, Any]]]:
    """As Qwen's newer models write them; ValueError where the text is something else."""
    found, at = [], 0
    while (begin := text.find(FUNCTION, at)) >= 0:
        if text[at:begin].strip():
            raise ValueError("words between calls")
        name, start = _upto(text, begin + len(FUNCTION), ">")
        end = text.find(FUNCTION_END, start)
        if end < 0:
            raise ValueError("no end")
        at = end + len(FUNCTION_END)
        found.append((name, _pairs(text[start:end], "<parameter=", ">", "", "</parameter>", schemas.get(name, {}))))
    if not found or text[at:].strip():
        raise ValueError("no call")
    return found


def keyed_call(text: str, schemas: Schemas) -> list[tuple[str, dict[str, Any]]]:
    """As GLM writes them: the name, then keys and values in tags."""
    at = text.find("<arg_key>")
    name = (text if at < 0 else text[:at]).strip()
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.replace("-", "_").replace(".", "_").isidentifier():
        raise ValueError("no name")
    given = text[at:] if at >= 0 else ""
    return [(name, _pairs(given, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", schemas.get(name, {})))]


def _pairs(text: str, before: str, behind: str, value: str, end: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Key between `before` and `behind`, value between `value` and `end`."""
    found: dict[str, Any] = {}
    properties = schema.get("properties")
    at = 0
    while (begin := text.find(before, at)) >= 0:
        if text[at:begin].strip():
            raise ValueError("words between arguments")
        key, start = _upto(text, begin + len(before), behind)
        if value:
            valued = text.find(value, start)
            if valued < 0 or text[start:valued].strip():
                raise ValueError("no value")
            start = valued + len(value)
        stop = text.find(end, start)
        if stop < 0:
            raise ValueError("no end")
        known = properties.get(key) if isinstance(properties, Mapping) else None
        found[key] = _value(text[start:stop], known if isinstance(known, Mapping) else {})
        at = stop + len(end)
    if text[at:].strip():
        raise ValueError("words behind arguments")
    return found


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """One line break on either side belongs to the tags. Text, unless it is JSON and no text is asked for."""
    text = text.removeprefix("\n").removesuffix("\n")
    if schema.get("type") == "string":
        return text
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)


def _upto(text: str, start: int, mark: str) -> tuple[str, int]:
    """The name that ends with `mark`, and the place behind it."""
    end = text.find(mark, start, start + MAX_NAME_CHARS + len(mark))
    name = text[start:end].strip()
    if end < 0 or not name:
        raise ValueError("no name")
    return name, end + len(mark)
