"""A prompt from a template that a client sends, in the part of Go's template language that such templates need."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peerllm.api.error_answers import FieldError

MAX_TEMPLATE_CHARS = 64 << 10
_PIECE = re.compile(r"(\{\{.*?\}\})", re.DOTALL)
_KNOWN = "only .System, .Prompt, .Suffix and .Response, if, else and end"


def prompt_of(template: str, values: Mapping[str, str]) -> str:
    """Up to `.Response`; FieldError for what is not understood. `values` by name, as "Prompt"."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise FieldError(f"template has more than {MAX_TEMPLATE_CHARS} characters", "template")
    pieces = _PIECE.split(template)  # text and actions in turn
    for at in range(1, len(pieces), 2):  # blanks next to a dash go first, whatever is shown
        if pieces[at].startswith("{{-"):
            pieces[at - 1] = pieces[at - 1].rstrip()
        if pieces[at].endswith("-}}"):
            pieces[at + 1] = pieces[at + 1].lstrip()
    made, branches = list[str](), list[tuple[bool, bool]]()  # of each if: shown now, and shown at some point
    for at, piece in enumerate(pieces):
        shown = all(one for one, _ in branches)
        if at % 2 == 0:
            made.append(piece if shown else "")
            continue
        words = piece.strip("{}").removeprefix("-").removesuffix("-").split()
        match words:
            case [name] if name.startswith("."):
                value = _value(name, values)
                if shown and name == ".Response":
                    break
                made.append(value if shown else "")
            case ["if", name]:
                branches.append((bool(_value(name, values)),) * 2)
            case ["else"] if branches:
                branches[-1] = (not branches[-1][1], True)
            case ["else", "if", name] if branches:
                found = not branches[-1][1] and bool(_value(name, values))
                branches[-1] = found, branches[-1][1] or found
            case ["end"] if branches:
                branches.pop()
            case _:
                raise FieldError(f"template: {piece[:60]} is not understood here; {_KNOWN} are", "template")
    else:
        if branches:
            raise FieldError("template: an if has no end", "template")
    return "".join(made)


def _value(name: str, values: Mapping[str, str]) -> str:
    if name != ".Response" and name[1:] not in values:
        raise FieldError(f"template: {name[:60]} is not known here; {_KNOWN} are", "template")
    return values.get(name[1:], "")
