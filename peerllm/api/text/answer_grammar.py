"""What an answer's text must be, as a grammar of llguidance's that was compiled once. Runs where templates do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from peerllm.engine.messages import GRAMMAR_LIMITS
from peerllm.errors import BadInputError, PeerLLMError

MAX_REASON_CHARS = 300
# Between JSON's signs: a model that may write any white space writes it without end.
JSON_OPTIONS: Any = {"whitespace_pattern": " ?"}
_SPACE = r"/\s{0,4}/"  # behind a thought


def grammar_of(form: Mapping[str, Any], special: Sequence[str], thought_end: str = "") -> str:
    """The grammar of an AnswerForm; BadInputError with the reason if it is none, or too large.

    `special` are the model's special tokens. `thought_end`: the answer begins with a thought, which ends with this, a
    text in quotes or a token `<[id]>`.
    """
    try:
        body = _body(form)
        _check(json.dumps({"grammars": [body]}), special)
        around = [json.dumps(form.get(name, "")) if form.get(name) else "" for name in ("before", "after")]
        rules = f"start: {'thought ' if thought_end else ''}{around[0]} @body {around[1]}\n"
        if thought_end.startswith("<"):
            rules += f"thought: /(.|\\n)*/ {thought_end} {_SPACE}\n"
        elif thought_end:
            rules += f"thought: thinking {_SPACE}\nthinking[suffix={thought_end}]: /(.|\\n)*/\n"
        if not thought_end and not any(around):
            return json.dumps({"grammars": [body]})
        return json.dumps({"grammars": [{"lark_grammar": rules}, {**body, "name": "body"}]})
    except RecursionError as error:
        raise BadInputError("the answer's form is nested too deeply") from error
    except PeerLLMError:
        raise
    except ValueError as error:
        raise _refused(str(error)) from error


def _body(form: Mapping[str, Any]) -> dict[str, Any]:
    kind = form["kind"]
    if kind == "lark":
        return {"lark_grammar": form["grammar"]}
    if kind == "regex":
        whole = LLMatcher.grammar_from_regex(form["grammar"])
    else:
        schema = form.get("schema", {}) if kind == "schema" else {"type": "object"}
        whole = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    found: dict[str, Any] = json.loads(whole)["grammars"][0]
    return found


def _check(grammar: str, special: Sequence[str]) -> None:
    """Compile it once, over bytes, within the limits that it will have."""
    matcher = LLMatcher(_bytes(tuple(special)), grammar, log_level=0, limits=LLParserLimits(**GRAMMAR_LIMITS))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _refused(matcher.get_error())


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
