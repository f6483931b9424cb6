"""The code a person carries from one screen to the other: "K7-4PQ9MX"."""

from __future__ import annotations

import secrets

from peerllm.errors import PairingError

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's: no I, L, O, U
DOOR_CHARACTERS = 2  # public: says which door to knock at
SECRET_CHARACTERS = 6  # 30 bits, three tries: one chance in 358 million
LOOK_ALIKES = str.maketrans({"O": "0", "I": "1", "L": "1", "U": "V"})
SEPARATORS = str.maketrans("", "", "-\u2013\u2014_ .\t")
MAX_TYPED_CHARACTERS = 64


def make_code() -> str:
    """A fresh code: door name, dash, secret."""
    characters = "".join(secrets.choice(ALPHABET) for _ in range(DOOR_CHARACTERS + SECRET_CHARACTERS))
    return f"{characters[:DOOR_CHARACTERS]}-{characters[DOOR_CHARACTERS:]}"


def normalise(typed: str) -> str:
    """What a person typed, as `make_code` writes it; PairingError if it cannot be a code."""
    code = typed[:MAX_TYPED_CHARACTERS].translate(SEPARATORS).upper().translate(LOOK_ALIKES)
    if len(code) != DOOR_CHARACTERS + SECRET_CHARACTERS or not set(code) <= set(ALPHABET):
        raise PairingError(f"{typed[:MAX_TYPED_CHARACTERS]!r} is not a pairing code; one looks like K7-4PQ9MX")
    return f"{code[:DOOR_CHARACTERS]}-{code[DOOR_CHARACTERS:]}"


def door_name(code: str) -> str:
    """The public part of a code: two characters the inviting device may advertise."""
    return normalise(code)[:DOOR_CHARACTERS]
