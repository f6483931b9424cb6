"""What outlives a restart: the roster, and where the other devices were last."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from peerllm import codec
from peerllm.errors import BadInputError, LinkError
from peerllm.saved_files import SavedFile
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
        self._files = {
            ROSTER_FILE: SavedFile(directory / ROSTER_FILE, "the household's list of devices"),
            PEERS_FILE: SavedFile(directory / PEERS_FILE, "where the other devices were"),
        }

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
        await self._files[ROSTER_FILE].save(roster.save())

    async def save_known(self, known: tuple[Known, ...]) -> None:
        await self._files[PEERS_FILE].save(codec.encode(PeersFile(known), PeersFile))

    async def close(self) -> None:
        for file in self._files.values():
            await file.close()

    def _read(self, name: str) -> bytes | None:
        path = self._directory / name
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInputError(f"{path} cannot be read: {error.strerror}") from error
        self._files[name].written = data
        return data
