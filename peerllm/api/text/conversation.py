"""Messages and tools in the shape that a model's chat template expects; templates are asked what they can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peerllm.api.text.template import ChatTemplate, Message
from peerllm.errors import BadInputError

SHORT_ID_CHARS = 9  # Mistral's templates take ids of calls with this many letters and digits, no others
_INSTRUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
_CALL_ID, _OTHER_ID = "probe0id0", "probe1id1"


@dataclass(frozen=True, slots=True)
class TemplateAbilities:
    """What a chat template makes of messages and tools. What it cannot do is written into plain messages instead."""

    system: bool = True  # it takes a message of the system
    tools: bool = False  # it writes down which tools there are ...
    calls: bool = False  # ... the calls of earlier answers ...
    results: bool = False  # ... and what came of them
    several: bool = False  # calls in one message
    strings: bool = False  # it expects arguments as text, not as an object
    responses: bool = False  # it expects results within the message with the calls, as Gemma 4's

    @classmethod
    def of(cls, template: ChatTemplate) -> TemplateAbilities:
        """By rendering short conversations."""
        parameters = {"type": "object", "properties": {"probekey": {"type": "string"}}}
        function = {"name": "probetool", "description": "d", "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        user = {"role": "user", "content": "probeuser"}

        try:
            template.render([user])
        except BadInputError:
            return cls()  # what it does with more does not matter

        def written(messages: Sequence[Message], *words: str) -> bool:
            try:
                text = template.render(messages, {"tools": tools})
            except BadInputError:
                return False
            return all(word in text for word in words)

        def talk(*arguments: Any) -> list[Message]:
            ids = (_CALL_ID, _OTHER_ID)
            calls = [_shaped_call(ids[at], f"probefirst{at}", one) for at, one in enumerate(arguments)]
            results = [_result(ids[at], f"probefirst{at}", f"proberesult{at}") for at, _ in enumerate(arguments)]
            return [user, {"role": "assistant", "content": "", "tool_calls": calls}, *results]

        as_object, as_text = talk({"probekey": "probevalue"}), talk('{"probekey": "probevalue"}')
        words = "probefirst0", "probekey", "probevalue"
        read = {
            strings: written(said[:2], *words) or written(said, *words)
            for strings, said in ((False, as_object), (True, as_text))
        }
        # A template that writes arguments as JSON escapes a text's quotation marks; one that inserts them does not.
        strings = not read[False] or (
            read[True] and not _escapes(template, as_text, tools) and not _is_json(template, as_object, tools)
        )
        return cls(
            system=written([{"role": "system", "content": "probesystem"}, user], "probesystem"),
            tools=written([user], "probetool"),
            calls=any(read.values()),
            results=any(read.values()) and written(as_text if strings else as_object, "proberesult0"),
            several=written(talk({}, {}) if not strings else talk("{}", "{}"), "probefirst0", "probefirst1"),
            strings=strings and any(read.values()),
            responses="tool_responses" in template.source,
        )


def shaped(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], can: TemplateAbilities, short_ids: bool
) -> tuple[list[Message], Sequence[Mapping[str, Any]]]:
    """Messages (of Generation's form) and tools for the template. Results without an id belong to the calls in turn."""
    found: list[Message] = []
    waiting: list[tuple[str, str]] = []  # calls without a result: id and name
    for message in _one_by_one(messages) if not can.several and can.calls else messages:
        calls = message.get("tool_calls") or ()
        if message["role"] == "assistant" and calls:
            ids = [_id(call.get("id", ""), f"{len(found)}.{at}", short_ids) for at, call in enumerate(calls)]
            waiting = [(one, str(call["name"])) for one, call in zip(ids, calls, strict=True)]
            found.append(_calling(message, ids, can))
        elif message["role"] == "tool":
            wanted, name = message.get("tool_call_id") or "", message.get("name") or ""
            wanted = _id(wanted, "", short_ids) if wanted else ""
            by_id = [one for one in waiting if wanted and one[0] == wanted]
            by_name = [one for one in waiting if not wanted and one[1] == name]
            call = next(iter(by_id or by_name or ([] if wanted else waiting)), None)
            if call is not None:
                waiting.remove(call)
            call_id, known = call or (wanted or _id("", f"{len(found)}", short_ids), name)
            result = _result(call_id, name or known, str(message["content"]))
            if can.responses and call is not None and "tool_calls" in found[-1]:
                response = {"name": result["name"], "response": _object_or_text(result["content"])}
                found[-1] = {**found[-1], "tool_responses": [*found[-1].get("tool_responses", ()), response]}
            else:
                found.append(result if can.results else _told_result(result))
        else:
            found.append({"role": message["role"], "content": message["content"]})
    if not can.results:
        found = _merged(found)
    if tools and not can.tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        return _with_instruction(found, _INSTRUCTION.format(tools=lines), can.system), ()
    return found, tools


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each call in a message of its own, its result behind it."""
    found: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = list(message.get("tool_calls") or ())
        if len(calls) < 2:
            found.append(message)
            continue
        results: list[Message] = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            content = message["content"] if number == 0 else ""
            found.append({"role": "assistant", "content": content, "tool_calls": [call]})
            named = [one for one in results if one.get("tool_call_id") and one.get("tool_call_id") == call.get("id")]
            bare = [one for one in results if not one.get("tool_call_id")]
            for one in (named or bare)[:1]:
                found.append(one)
                results.remove(one)
        found += results
    return found


def _calling(message: Message, ids: Sequence[str], can: TemplateAbilities) -> Message:
    content = str(message["content"])
    calls = [(one, str(call["name"]), call.get("arguments") or {}) for one, call in zip(ids, message["tool_calls"])]  # noqa: B905
    if can.calls:
        shaped_calls = [
            _shaped_call(one, name, json.dumps(given, ensure_ascii=False) if can.strings else given)
            for one, name, given in calls
        ]
        return {"role": "assistant", "content": content, "tool_calls": shaped_calls}
    lines = [json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for _, name, given in calls]
    written = "\n".join(f"<tool_call>\n{line}\n</tool_call>" for line in lines)
    return {"role": "assistant", "content": f"{content}\n{written}" if content else written}


def _shaped_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _result(call_id: str, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": call_id, "name": name}


def _told_result(result: Message) -> Message:
    return {"role": "user", "content": f"<tool_response>\n{result['content']}\n</tool_response>"}


def _object_or_text(content: str) -> Any:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return found if isinstance(found, dict) else content


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of the user as one: many templates want turns."""
    found: list[Message] = []
    for message in messages:
        if found and message["role"] == found[-1]["role"] == "user":
            found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n{message['content']}"}
        else:
            found.append(message)
    return found


def _with_instruction(messages: list[Message], text: str, system: bool) -> list[Message]:
    """In the message of the system; where the template takes none, in the first one of the user."""
    role = "system" if system else "user"
    at = next((at for at, one in enumerate(messages) if one["role"] == role), None)
    if at is None or (system and at > 0):
        return [{"role": role, "content": text}, *messages]
    content = messages[at]["content"]
    both = f"{content}\n\n{text}" if system else f"{text}\n\n{content}"
    return [*messages[:at], {"role": role, "content": both}, *messages[at + 1 :]]


def _id(given: str, place: str, short: bool) -> str:
    """The id of a call; `place` makes one where there is none."""
    if given and (not short or (len(given) == SHORT_ID_CHARS and given.isascii() and given.isalnum())):
        return given
    digest = hashlib.sha256((given or f"at {place}").encode()).hexdigest()
    return digest[:SHORT_ID_CHARS] if short else f"call_{digest[:24]}"


def _escapes(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    return '\\"probekey' in _rendered(template, messages, tools)


def _is_json(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether arguments given as an object are not written as Python writes dictionaries."""
    return "{'probekey" not in _rendered(template, messages, tools)


def _rendered(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any]) -> str:
    for said in (messages, messages[:2]):
        try:
            return template.render(said, {"tools": tools})
        except BadInputError:
            continue
    return ""
