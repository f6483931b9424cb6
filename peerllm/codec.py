"""Messages as JSON: closed unions of frozen dataclasses, strictly typed both ways.

Used for control messages between daemons and between a daemon and its engine. Numbers are not coerced from strings,
unknown keys and unknown types are refused, and the size is bounded before anything is parsed.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import cattrs
import orjson
from cattrs.preconf.orjson import make_converter
from cattrs.strategies import configure_tagged_union

from peerllm.errors import LinkError

MAX_MESSAGE_BYTES = 16 << 20  # the largest message is the manifest of a model with many thousand tensors

T = TypeVar("T")


def _strict(kind: type) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{kind.__name__} expected, not {type(value).__name__}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"number expected, not {type(value).__name__}")
    return float(value)


@lru_cache(maxsize=32)
def _converter(union: Any) -> cattrs.Converter:
    converter = make_converter(forbid_extra_keys=True, detailed_validation=False)
    for kind in (int, str, bool):
        converter.register_structure_hook(kind, _strict(kind))
    converter.register_structure_hook(float, _number)
    converter.register_unstructure_hook(bytes, bytes.hex)  # of which C does more than of base 85
    converter.register_structure_hook(bytes, lambda value, _: bytes.fromhex(value))
    for tagged in _unions(union):  # inner unions first: the hooks of outer ones use theirs
        configure_tagged_union(tagged, converter, tag_name="type")
    return converter


def _unions(kind: Any) -> list[Any]:
    """All unions of two or more message types in `kind`, itself included, the innermost first."""
    found: list[Any] = []
    members = [member for member in get_args(kind) if member is not Ellipsis]
    for inner in get_type_hints(kind).values() if is_dataclass(kind) else members:
        found += [union for union in _unions(inner) if union not in found]
    if get_origin(kind) in (Union, UnionType) and sum(map(is_dataclass, members)) > 1:
        found.append(kind)
    return found


def encode(message: object, union: Any) -> bytes:
    """Encode `message`, one of `union`, as JSON bytes that, in a union of several, begin with its class name."""
    return orjson.dumps(_type_first(_converter(union).unstructure(message, unstructure_as=union)))


def _type_first(raw: Any) -> Any:
    """The same with the class name first, also of a message in it: who reads knows it before the rest has come."""
    if type(raw) is not dict or "type" not in raw:
        return raw
    return {"type": raw["type"], **{key: _type_first(value) for key, value in raw.items()}}


def decode(data: bytes | str, union: Any) -> Any:
    """Decode one message of `union`; LinkError if `data` is too large, no JSON, or not exactly such a message."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise LinkError(f"message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        return _converter(union).structure(orjson.loads(data), union)
    except (ValueError, TypeError, KeyError, AttributeError, cattrs.BaseValidationError, RecursionError) as error:
        raise LinkError(f"malformed message: {str(error)[:200] or type(error).__name__}") from error
    except Exception as error:  # cattrs raises its own exceptions for unknown keys
        if type(error).__module__.startswith("cattrs"):
            raise LinkError(f"malformed message: {str(error)[:200]}") from error
        raise
