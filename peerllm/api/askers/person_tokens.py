"""Tokens of named persons: each opens this device's API for one, and can be taken back alone.

Only hashes are kept. A person may ask the models; what changes the household takes the device's own token.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from peerllm.errors import BadInputError, NotFoundError
from peerllm.regular_files import read_regular
from peerllm.saved_files import replace_file

TOKENS_FILE = "persons.json"
TOKEN_BYTES = 32
MAX_PERSONS = 64
MAX_PERSON_CHARS = 63
MAX_FILE_BYTES = 64 << 10


class PersonToken(Struct, frozen=True):
    """`created` in Unix seconds."""

    person: Annotated[str, Meta(min_length=1, max_length=MAX_PERSON_CHARS)]
    sha256: str
    created: int


def is_person(name: str) -> bool:
    """Whether that may be a person's name: it stands in lists and in the names of shares."""
    return 1 <= len(name) <= MAX_PERSON_CHARS and name.isprintable() and name == name.strip() and "/" not in name


class PersonTokens:
    """`file` None: there are none, and none can be made."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._writing = asyncio.Lock()
        self._tokens: dict[str, PersonToken] = {}  # by hash
        if file is not None and file.exists():
            try:
                found = msgspec.json.decode(read_regular(file, MAX_FILE_BYTES), type=list[PersonToken])
            except (OSError, msgspec.MsgspecError) as error:
                raise BadInputError(f"{file} cannot be used ({error}); delete it, and make new tokens") from error
            self._tokens = {one.sha256: one for one in found if is_person(one.person)}

    def person_of(self, token: str) -> str:
        """Whose it is; "" if it is nobody's. A hash is looked up, so that the time tells nothing of the token."""
        found = self._tokens.get(_hashed(token))
        return found.person if found is not None else ""

    def listed(self) -> list[PersonToken]:
        """The oldest first."""
        return sorted(self._tokens.values(), key=lambda one: one.created)

    async def add(self, person: str) -> str:
        """A new token, which is told this once."""
        if not is_person(person):
            raise BadInputError(f"a person's name has 1 to {MAX_PERSON_CHARS} printable characters, and no /")
        async with self._writing:
            if any(one.person.lower() == person.lower() for one in self._tokens.values()):
                raise BadInputError(f"{person} has a token already; take it back first: peerllm token revoke {person}")
            if len(self._tokens) >= MAX_PERSONS:
                raise BadInputError(f"{MAX_PERSONS} persons have tokens already; take one back first")
            token = secrets.token_urlsafe(TOKEN_BYTES)
            made = PersonToken(person, _hashed(token), int(time.time()))
            await self._keep({**self._tokens, made.sha256: made})
        return token

    async def revoke(self, person: str) -> None:
        """From now on the token opens nothing; answers under way are given to their end."""
        async with self._writing:
            left = {key: one for key, one in self._tokens.items() if one.person.lower() != person.lower()}
            if len(left) == len(self._tokens):
                raise NotFoundError(f"nobody called {person[:MAX_PERSON_CHARS]!r} has a token here")
            await self._keep(left)

    async def _keep(self, tokens: dict[str, PersonToken]) -> None:
        if self._file is None:
            raise BadInputError("this device keeps no tokens of persons")
        await asyncio.to_thread(replace_file, self._file, msgspec.json.encode(list(tokens.values())))
        self._tokens = tokens


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
