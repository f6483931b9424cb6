"""The model's chat template: foreign code, so it runs in jinja's sandbox with its steps and its output bounded.

What these bounds do not reach, as strings that double, ends at those of the process (text_child.py).
"""

from __future__ import annotations

import json
import operator
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peerllm.errors import BadInputError, ModelError

RENDER_TIME_S = 5.0  # seconds a template may take
MAX_RENDERED_CHARS = 32 << 20
_CLOCK_EVERY = 256  # traced lines between two looks at the clock

Message = Mapping[str, Any]


class _TemplateStopError(Exception):
    """The template ran for too long, or wrote too much."""


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _Generation(Extension):
    """`{% generation %}` marks the answer in training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, op: str, left: Any, right: Any) -> Any:
        """Products of numbers only as far as they stay small; powers, and text repeated, not at all."""
        if op == "*" and all(isinstance(one, (int, float)) and abs(one) < 2**64 for one in (left, right)):
            return operator.mul(left, right)
        if op == "*" and {type(left), type(right)} == {int, str}:
            size = len(left) * right if isinstance(left, str) else left * len(right)
            if size <= MAX_RENDERED_CHARS:
                return operator.mul(left, right)
        raise _TemplateStopError(f"the operator {op} on these values is not allowed")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the day where the person is


class ChatTemplate:
    """A compiled template; rendering is CPU work for a worker thread."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,  # the text is for a tokenizer
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error
        self._variables = dict(variables)
        self.source = source

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt up to where the answer begins; BadInputError if the template refuses these messages."""
        known = {**self._variables, **(variables or {})}
        pieces: list[str] = []
        size = 0
        try:
            with _Deadline(RENDER_TIME_S):
                for piece in self._template.generate(
                    **known, messages=[dict(one) for one in messages], add_generation_prompt=True
                ):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_RENDERED_CHARS:
                        raise _TemplateStopError(f"it writes more than {MAX_RENDERED_CHARS} characters")
        except _Refusal as error:
            raise BadInputError(f"the model's chat template refuses these messages: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # whatever foreign code may raise
            line = f"{type(error).__name__}: {error}" if not isinstance(error, _TemplateStopError) else str(error)
            raise BadInputError(f"the model's chat template failed: {line[:300]}") from error
        return "".join(pieces)


class _Deadline:
    """Within it, this thread's Python code stops with an error once time is up: a loop has no call to hook."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._seconds = seconds
        self._lines = 0
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        self._lines += 1
        if self._lines % _CLOCK_EVERY == 0 and time.monotonic() > self._until:
            raise _TemplateStopError(f"it runs for more than {self._seconds:g} s")
        return self._trace
