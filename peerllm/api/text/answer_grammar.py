"""What an answer must be, as a grammar of llguidance's that was compiled once. Runs where templates do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from peerllm.api.text.calls.answer_parts import Schemas
from peerllm.api.text.calls.call_forms import FORMS, CallForm
from peerllm.api.text.calls.call_patterns import ANY_TEXT, CallRules, ToolSchemaError, closed, lark_of
from peerllm.chat_templates import Marks
from peerllm.engine.messages import GRAMMAR_LIMITS
from peerllm.errors import BadInputError, PeerLLMError

MAX_REASON_CHARS = 300
# Between JSON's signs: a model that may write any white space writes it without end.
JSON_OPTIONS: Any = {"whitespace_pattern": " ?"}
# Those of strings that are kept.
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"})
_VALUES = frozenset({"const", "enum", "default", "examples"})  # what stands there is no schema
_SPACE = r"/\s{0,4}/"  # behind a thought
_FIRST_SPECIAL = 257  # id in `_Bytes`


@dataclass(frozen=True, slots=True)
class ModelMarks:
    """What a model writes besides words. `ids` are those of its special tokens (`byte_spelling.is_mark`).

    `opened`: the answer begins within a thought.
    """

    ids: Mapping[str, int]
    calls: CallForm | None = None
    thought: Marks | None = None
    opened: bool = False


@dataclass(frozen=True, slots=True)
class KeptCalls:
    """Calls that an answer must have (`needed`) or may have, with arguments that fit; `several`: more than one."""

    tools: Schemas
    needed: bool = False
    several: bool = True


def grammar_of(form: Mapping[str, Any] | None, calls: KeptCalls | None, marks: ModelMarks) -> str:
    """Of an answer in an AnswerForm (None: any text), or with calls; BadInputError with the reason if none can be made.

    What is wrong with a tool is a ToolSchemaError.
    """
    try:
        body, special = None if form is None else _body(form), tuple(marks.ids)
        # Checked over bytes and the special tokens, so that no vocabulary is needed for it.
        ids = {name: _FIRST_SPECIAL + at for at, name in enumerate(special)}
        if reason := _wrong(_whole(body, calls, replace(marks, ids=ids)), special):
            for name, schema in calls.tools.items() if calls is not None else ():
                if wrong := _wrong(json.dumps({"grammars": [_json(schema)]}), special):
                    raise ToolSchemaError(f"the arguments of {name[:80]!r} cannot be kept to their schema: {wrong}")
            raise _refused(reason)
        return _whole(body, calls, marks)
    except RecursionError as error:
        raise BadInputError("the answer's form is nested too deeply") from error
    except PeerLLMError:
        raise
    except ValueError as error:
        raise _refused(str(error)) from error


def _whole(body: Mapping[str, Any] | None, calls: KeptCalls | None, marks: ModelMarks) -> str:
    thought, rules = _thought(marks, calls is not None and not calls.needed and body is None)
    said, grammars = "@body", list[Mapping[str, Any]]()
    if marks.calls is FORMS["harmony"]:
        said = f"{lark_of('<|channel|>final<|message|>', marks.ids)} @body"
    if calls is not None:
        assert marks.calls is not None
        made = CallRules(marks.calls, calls.tools, marks.ids, calls.several)
        grammars += [{**_json(schema), "name": name} for name, schema in made.schemas.items()]
        rules += made.rules
        if calls.needed:
            said = "calls"
        elif body is not None:
            said = f"(calls | {said})"
        else:
            begin = marks.thought[0].strip() if marks.thought is not None and not marks.opened else ""
            rules += made.free("" if any(one in begin for one in marks.ids) else begin)
            said = "free"
    if body is not None and (calls is None or not calls.needed):
        if not rules:
            return json.dumps({"grammars": [body]})
        grammars.append({**body, "name": "body"})
    lark = "\n".join([f"start: {thought} {said}", *rules])
    return json.dumps({"grammars": [{"lark_grammar": lark + "\n"}, *grammars]})


def _thought(marks: ModelMarks, free: bool) -> tuple[str, list[str]]:
    """What an answer begins with, and the rules that this needs: a thought that was opened, or may be (`free`)."""
    if marks.calls is FORMS["harmony"]:
        ends = [lark_of(one, marks.ids) for one in ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")]
        known = "<|channel|>" in marks.ids  # else nothing would end it
        return ("", []) if free or not known else ("thought?", [f"thought: {ends[0]} {ANY_TEXT} {ends[1]}"])
    if marks.thought is None or not (marks.opened or free):
        return "", []
    begin, end = marks.thought
    rest = f"thinking[suffix={json.dumps(end)}]: {ANY_TEXT}"
    if end in marks.ids:
        rest = f"thinking: {ANY_TEXT} {lark_of(end, marks.ids)}"
    if marks.opened:
        return f"thinking {_SPACE}", [rest]
    return "thought?", [f"thought: {_SPACE} {lark_of(begin.rstrip(), marks.ids)} thinking {_SPACE}", rest]


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    try:
        kept = _known_formats(schema)
    except RecursionError:
        raise _refused("the schema is nested too deeply") from None
    return _first(LLMatcher.grammar_from_json_schema(kept, overrides=JSON_OPTIONS))


def _known_formats(schema: Any) -> Any:
    """Without the formats of strings that cannot be kept: they are notes, as "password" is."""
    if isinstance(schema, list):
        return [_known_formats(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        name: value if name in _VALUES else _known_formats(value)
        for name, value in schema.items()
        if name != "format" or not isinstance(value, str) or value in _FORMATS
    }


def _first(whole: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(whole)["grammars"][0]
    return found


def _body(form: Mapping[str, Any]) -> dict[str, Any]:
    kind = form["kind"]
    if kind == "lark":
        return {"lark_grammar": form["grammar"]}
    if kind == "regex":
        return _first(LLMatcher.grammar_from_regex(form["grammar"]))
    return _json(closed(form.get("schema", {})) if kind == "schema" else {"type": "object"})


def _wrong(grammar: str, special: tuple[str, ...]) -> str:
    """Why it does not compile, over bytes, within the limits that it will have; "": it does."""
    matcher = LLMatcher(_bytes(special), grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return " ".join(matcher.get_error().split())[:MAX_REASON_CHARS] if matcher.is_error() else ""


def _refused(reason: str) -> BadInputError:
    return BadInputError(f"the answer's form cannot be used: {' '.join(reason.split())[:MAX_REASON_CHARS]}")


class _Bytes:
    """A vocabulary of all bytes, an end, and special tokens; nothing is encoded with it."""

    bos_token_id = None

    def __init__(self, special: Sequence[str]) -> None:
        self.eos_token_id = 256
        self.tokens = [*(bytes([one]) for one in range(256)), b"</s>", *(one.encode() for one in special)]
        self.special_token_ids = range(256, len(self.tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(2)
def _bytes(special: tuple[str, ...]) -> Any:
    return LLTokenizer(TokenizerWrapper(_Bytes(special)))
