"""What outlives a restart: the roster, and where the other devices were last."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from peerllm import codec
from peerllm.errors import BadInputError, LinkError
from peerllm.transport.identity import Identity
from peerllm.transport.roster.roster import MAX_MEMBERS, Roster
from peerllm.types import DeviceId

ROSTER_FILE = "household.json"
PEERS_FILE = "peers.json"
MAX_FILE_BYTES = codec.MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """Where a device was last."""

    device: DeviceId
    name: str
    hosts: tuple[str, ...]
    control_port: int
    data_port: int


@dataclass(frozen=True, slots=True)
class PeersFile:
    peers: tuple[Known, ...]


class NetworkFiles:
    """Reads at start; writes what it is given in turn, off the loop, each file as a whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, bytes] = {}
        self._turn = asyncio.Lock()

    def roster(self, identity: Identity, name: str) -> Roster:
        """The household as it was; a household of one if there was none. BadInputError if the file is damaged."""
        data = self._read(ROSTER_FILE)
        if data is None:
            return Roster.create(identity, name)
        roster = Roster.load(data)
        if roster.device != identity.device:
            path = self._directory / ROSTER_FILE
            raise BadInputError(f"{path} belongs to another device; move it away to start in a household of one")
        return roster

    def known(self) -> tuple[Known, ...]:
        """Where the others were last; nothing if that cannot be read."""
        data = self._read(PEERS_FILE)
        if data is None:
            return ()
        try:
            file: PeersFile = codec.decode(data, PeersFile)
        except LinkError as error:
            log.warning("%s is damaged and not used: %s", self._directory / PEERS_FILE, error)
            return ()
        return file.peers[:MAX_MEMBERS]

    async def save_roster(self, roster: Roster) -> None:
        await self._write(ROSTER_FILE, roster.save())

    async def save_known(self, known: tuple[Known, ...]) -> None:
        await self._write(PEERS_FILE, codec.encode(PeersFile(known), PeersFile))

    def _read(self, name: str) -> bytes | None:
        path = self._directory / name
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInputError(f"{path} cannot be read: {error.strerror}") from error
        self._written[name] = data
        return data

    async def _write(self, name: str, data: bytes) -> None:
        async with self._turn:
            if self._written.get(name) == data:
                return
            try:
                await asyncio.to_thread(_replace, self._directory / name, data)
            except OSError as error:
                log.error("%s cannot be written (%s); a restart will not know what changed", name, error)
                return
            self._written[name] = data


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.new")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
