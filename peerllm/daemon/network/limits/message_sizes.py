"""How large a control message of each class may be. Its class is read off the first bytes, before it is taken in."""

from __future__ import annotations

import re

from peerllm.codec import MAX_MESSAGE_BYTES
from peerllm.errors import LinkError

SMALL_BYTES = 16 << 10  # a few numbers, names and a sentence
_MIDDLE = 64 << 10  # a row for each device of the largest household
_VIEW = 512 << 10  # a row for each stage of all deployments that one device coordinates
_GOSSIP = 8 << 20  # every entry that a roster may hold, with a certificate of the size that ours have
MAX_BYTES = {
    "Hello": _MIDDLE,
    "Whereabouts": _MIDDLE,
    "LinkTable": _MIDDLE,
    "DeviceView": _VIEW,
    "Gossip": _GOSSIP,
    "Assign": MAX_MESSAGE_BYTES,  # asks that name every tensor, or carry a model's config
    "Profile": MAX_MESSAGE_BYTES,
    "Have": 128 << 10,  # MAX_KEYS hashes
    "Vote": 64 << 10,  # a plan's devices
    "AnswerCopied": 4 << 20,  # prompt ids
    "AnswerGrew": 64 << 10,  # ids of a tenth of a second
    "Answer": MAX_MESSAGE_BYTES,  # what an engine has recorded
}
_CLASS = re.compile(rb'\{"type":"(?:Ask","number":-?[0-9]{1,20},"body":\{"type":")?([A-Za-z]{1,40})"')
MOST_OPENING_BYTES = 128  # of a message, in which its class stands


def class_of(opening: bytes) -> str:
    """The class that a message names first, of an Ask its body's. LinkError if there is none."""
    found = _CLASS.match(opening)
    if found is None:
        raise LinkError("malformed message: its class does not come first")
    return found[1].decode()


def check_size(opening: bytes, nbytes: int) -> None:
    """LinkError if a message that begins so may not have that many bytes, or has another beginning than ours have."""
    name = class_of(opening)
    if nbytes > (most := MAX_BYTES.get(name, SMALL_BYTES)):
        raise LinkError(f"a {name} of {nbytes} bytes or more; the limit is {most}")


def check_class(opening: bytes, message: object) -> None:
    """LinkError if what was decoded is not what its beginning said: the later of two equal keys counts."""
    if (name := class_of(opening)) != type(message).__name__:
        raise LinkError(f"malformed message: a {type(message).__name__} that begins as a {name}")
