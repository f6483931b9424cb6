"""The short name by which people and clients call a deployment, one for each in a household. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count

from peerllm.daemon.facade import short_name
from peerllm.errors import BadInputError

ALIAS = re.compile(r"[A-Za-z0-9][\w.:+-]{0,63}")  # no slash: never taken for a path or a hub id


def name_for(model: str, alias: str, taken: Mapping[str, str]) -> str:
    """`alias`, or the short name of a path or hub id, numbered from 2 where a deployment has it already.

    `taken` says on which device each name stands; BadInputError where the alias is one of them, or no usable name.
    """
    if not alias:
        short = short_name(model)
        numbered = (short if number == 1 else f"{short}-{number}" for number in count(1))
        return next(name for name in numbered if name not in taken)
    if not ALIAS.fullmatch(alias):
        raise BadInputError(f"{alias[:80]!r} is no name: up to 64 letters, digits and . _ - : + make one")
    if alias in taken:
        raise BadInputError(f"a model called {alias} runs from {taken[alias]} already; give this one another name")
    return alias
